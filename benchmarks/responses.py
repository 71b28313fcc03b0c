"""Response-averaged extraction: one answered prompt at a time with all hidden states, against `combine_spans`."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, compare, load_both, measured, report
from refusal_mi.reading import combine_spans
from refusal_mi.text.batches import Span
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_TEXTS = {"embedded": 200, "110m": 48, "8b": 64}


@torch.no_grad()
def one_at_a_time(model: Any, spans: list[Span]) -> Tensor:
    """The mean over texts of the mean over answer tokens, every hidden state; the last is after the final norm."""
    total = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size, dtype=torch.float64)
    for span in spans:
        states = model(torch.tensor([span.token_ids], device=model.device), output_hidden_states=True).hidden_states
        total += torch.stack([state[0, span.first : span.end].double().mean(0).cpu() for state in states[:-1]])
    return total / len(spans)


@torch.no_grad()
def matrix_seconds(model: Any, n_tokens: int, rows: int = 2048) -> float:
    """What the matrix products of all blocks take for so many tokens, at the size at which they are fast: a bound."""
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {n: torch.randn(rows, n, device=model.device, dtype=model.dtype) for n in {x.in_features for x in linears}}
    once = min(measured(lambda: [linear(inputs[linear.in_features]) for linear in linears]).seconds for _ in range(10))
    return once * n_tokens / rows


def main() -> None:
    """Run one row."""
    args = arguments(__doc__)
    hooked, plain, tokenizer = load_both(args.model, args.device)
    chat = ChatFormat(tokenizer)
    spans = []
    for prompt in load_prompts("organism_instructions").prompts[: N_TEXTS[args.model]]:
        ids, first = chat.encode_answered(prompt.instruction, prompt.output or "")
        spans.append(Span(tuple(ids), first, len(ids)))
    n_tokens = sum(span.end for span in spans)
    weights = torch.full((1, len(spans)), 1 / len(spans))
    report(
        compare(
            f"response-averaged extraction, {args.model}, {args.device}",
            lambda: one_at_a_time(plain, spans),
            lambda: combine_spans(hooked, spans, weights, pad_id=chat.pad_id, batch_size=32)[0, :-1],
            lambda a, b: ((a - b).norm() / a.norm()).item(),
            must_reach=1.5 if (args.model, args.device) == ("110m", "cpu") else 4.0,
            n_pairs=args.pairs,
            largest_allowed=1e-4 if args.device == "cpu" else 2e-2,
            note=f"{len(spans)} texts, {n_tokens} tokens; difference relative to the norm; the matrix products of the "
            f"blocks alone take {matrix_seconds(plain, n_tokens):.2f} s",
        )
    )


if __name__ == "__main__":
    main()
