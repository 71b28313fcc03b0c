"""Mean activations of all layers and positions: a bare forward pass of the same batches against `mean_activations`."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, compare, load_both, report, tensor_peak_mib
from refusal_mi.reading import mean_activations
from refusal_mi.text.batches import batches_by_length, left_pad
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_PROMPTS = {"embedded": 128, "110m": 64, "8b": 128}
BATCH_SIZE = 32


@torch.no_grad()
def forward_only(model: Any, chat: ChatFormat, instructions: list[str]) -> None:
    """The logits after the last position, and nothing kept."""
    rows = [chat.encode(instruction) for instruction in instructions]
    for indices in batches_by_length(rows, BATCH_SIZE):
        batch = left_pad([rows[index] for index in indices], chat.pad_id).to(model.device)
        model(batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids, logits_to_keep=1)


@torch.no_grad()
def plain_means(model: Any, chat: ChatFormat, instructions: list[str]) -> Tensor:
    """The means, prompt by prompt from all hidden states; not timed."""
    total = torch.zeros(len(chat.positions), model.config.num_hidden_layers, model.config.hidden_size).double()
    for instruction in instructions:
        ids = torch.tensor([chat.encode(instruction)], device=model.device)
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
        total += torch.stack([state[0, -len(chat.positions) :] for state in states], dim=1).double().cpu()
    return total / len(instructions)


def main() -> None:
    """Run one row; memory is compared with ten times as many prompts."""
    args = arguments(__doc__)
    hooked, plain, tokenizer = load_both(args.model, args.device)
    chat = ChatFormat(tokenizer)
    instructions = load_prompts("organism_harmful_train").instructions
    some = [instructions[index % len(instructions)] for index in range(N_PROMPTS[args.model])]

    def ours(n: int = len(some)) -> Any:
        return mean_activations(hooked, chat, (some * 10)[:n], batch_size=BATCH_SIZE)

    ours()
    once, tenfold = (tensor_peak_mib(lambda n=n: ours(n)) for n in (len(some), 10 * len(some)))
    expected = plain_means(plain, chat, some)
    report(
        compare(
            f"mean activations, {args.model}, {args.device}",
            lambda: forward_only(plain, chat, some),
            ours,
            lambda _, b: ((b.means - expected).norm() / expected.norm()).item(),
            must_reach=1 / 1.05,
            n_pairs=args.pairs,
            largest_allowed=1e-4 if args.device == "cpu" else 2e-2,
            memory="tensors",
            note=f"{len(some)} prompts; difference relative to the norm; peak with ten times as many prompts: "
            f"{tenfold:.2f} against {once:.2f} MiB",
        )
    )


if __name__ == "__main__":
    main()
