"""CE loss of a text set: the published way (batches of 2, logits of every position) against `ce_loss`."""

from typing import Any

import torch

from benchmarks.common import arguments, compare, load_both, report
from refusal_mi.measures import MAX_TEXT_TOKENS, ScoredText, answers_to_score, ce_loss, texts_to_score
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_TEXTS = {"embedded": 100, "110m": 24, "8b": 64}
PUBLISHED_BATCH = 2


@torch.no_grad()
def published_loss(model: Any, texts: list[ScoredText], pad_id: int) -> float:
    """Full logits, their log-probabilities, and a mask over what is predicted."""
    total, count = 0.0, 0
    for start in range(0, len(texts), PUBLISHED_BATCH):
        some = texts[start : start + PUBLISHED_BATCH]
        width = max(len(text.token_ids) for text in some)
        ids = torch.tensor([[*text.token_ids, *[pad_id] * (width - len(text.token_ids))] for text in some])
        real = torch.tensor([[1] * len(text.token_ids) + [0] * (width - len(text.token_ids)) for text in some])
        is_scored = real.bool() & (torch.arange(width) >= torch.tensor([[text.first] for text in some]))
        ids, real, is_scored = (each.to(model.device) for each in (ids, real, is_scored))
        log_probs = model(ids, attention_mask=real).logits.float().log_softmax(-1)
        losses = -log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        total += (losses * is_scored[:, 1:]).double().sum().item()
        count += int(is_scored[:, 1:].sum())
    return total / count


def documents(chat: ChatFormat) -> list[str]:
    """The embedded plain texts joined until each is as long as what the published evaluation reads (256 tokens)."""
    found, current = [], ""
    for text in load_prompts("organism_plain_text").instructions:
        current = f"{current} {text}".strip()
        if len(chat.tokenizer(current)["input_ids"]) >= MAX_TEXT_TOKENS:
            found.append(current)
            current = ""
    return found


def main() -> None:
    """Run two rows."""
    args = arguments(__doc__)
    hooked, plain, tokenizer = load_both(args.model, args.device)
    chat, n = ChatFormat(tokenizer), N_TEXTS[args.model]
    answered = load_prompts("organism_instructions").prompts
    sets = {
        "instructions": answers_to_score(chat, [(each.instruction, each.output or "") for each in answered])[:n],
        "plain text": texts_to_score(chat, documents(chat))[: n // 4],
    }
    for name, texts in sets.items():
        lengths = [len(text.token_ids) for text in texts]
        report(
            compare(
                f"CE loss, {name}, {args.model}, {args.device}",
                lambda: published_loss(plain, texts, chat.pad_id),
                lambda: ce_loss(hooked, chat, texts, batch_size=16).ce_loss,
                lambda a, b: abs(a - b),
                must_reach=1.5 if args.device == "cuda" else 1.3 if name == "instructions" else 1.0,
                n_pairs=args.pairs,
                largest_allowed=1e-4 if args.device == "cpu" else 2e-2,
                memory="tensors",
                note=f"{len(texts)} texts of {min(lengths)}–{max(lengths)} tokens; difference in nats per token",
            )
        )


if __name__ == "__main__":
    main()
