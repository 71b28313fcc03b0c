"""Greedy generation under ablation against plain HF `generate`, same batches, same number of tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import arguments, compare, load_both, report
from refusal_mi.directions import Direction
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.model.points import resid_hook
from refusal_mi.text.batches import batches_by_length, left_pad
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

NEW_TOKENS = {"embedded": 48, "110m": 24, "8b": 64}
N_PROMPTS, BATCH_SIZE = 32, 16


@torch.no_grad()
def plain_generate(model: Any, chat: ChatFormat, instructions: list[str], n_new: int) -> list[tuple[int, ...]]:
    """HF's own loop; returns the new ids of every prompt."""
    rows = [chat.encode(instruction) for instruction in instructions]
    found: dict[int, tuple[int, ...]] = {}
    for indices in batches_by_length(rows, BATCH_SIZE):
        batch = left_pad([rows[index] for index in indices], chat.pad_id).to(model.device)
        output = model.generate(
            batch.tokens, attention_mask=batch.mask, max_new_tokens=n_new, do_sample=False, pad_token_id=chat.pad_id
        )
        new = output[:, batch.tokens.shape[1] :].tolist()
        found.update({index: tuple(ids) for index, ids in zip(indices, new, strict=True)})
    return [found[index] for index in range(len(rows))]


def main() -> None:
    """Run one row."""
    args = arguments(__doc__)
    hooked, plain, tokenizer = load_both(args.model, args.device)
    chat, n_new = ChatFormat(tokenizer), NEW_TOKENS[args.model]
    # No answer ends early, so that both sides write the same number of tokens.
    for config in (plain.generation_config, hooked.original_model.generation_config):  # type: ignore[attr-defined]
        config.eos_token_id = None
    tokenizer.eos_token = None
    instructions = load_prompts("organism_harmless_train").instructions[:N_PROMPTS]
    vector = torch.randn(hooked.cfg.d_model, generator=torch.Generator().manual_seed(0))
    layer = hooked.cfg.n_layers // 2
    ablation = Ablate(Direction(vector, layer, resid_hook(layer, hooked.cfg.n_layers)))

    def ours(interventions: Sequence[Ablate] = (ablation,)) -> list[tuple[int, ...]]:
        answers = generate(
            hooked, chat, instructions, interventions=interventions, max_new_tokens=n_new, batch_size=BATCH_SIZE
        )
        return [answer.token_ids for answer in answers]

    def difference(plain_ids: list[tuple[int, ...]], ablated_ids: list[tuple[int, ...]]) -> float:
        """Answers of another length, and answers that differ without the ablation."""
        is_other_length = sum(len(a) != len(b) for a, b in zip(plain_ids, ablated_ids, strict=True))
        return is_other_length + sum(a != b for a, b in zip(plain_ids, ours(()), strict=True))

    report(
        compare(
            f"generation under ablation, {args.model}, {args.device}",
            lambda: plain_generate(plain, chat, instructions, n_new),
            ours,
            difference,
            must_reach=0.9,
            n_pairs=args.pairs,
            largest_allowed=0 if args.device == "cpu" else N_PROMPTS,  # bfloat16 has ties
            note=f"{N_PROMPTS} answers of {n_new} tokens, batch {BATCH_SIZE}; difference: answers of another "
            "length, or that differ without ablation",
        )
    )


if __name__ == "__main__":
    main()
