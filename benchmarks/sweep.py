"""The direction search: three plain sweeps with HF forward hooks against ours, same candidates, same scores."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import LONG_SYSTEM, arguments, compare, load_both, measured, report
from refusal_mi.directions import DirectionGrid, difference_in_means
from refusal_mi.files import read_json
from refusal_mi.model.points import HookedModel
from refusal_mi.reading import mean_activations
from refusal_mi.search.grid import ScoreGrid
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

BATCH_SIZE = 32
N_VAL = 32
REFUSAL_TOKENS = (40, 41)
EPSILON_SCORE, EPSILON_KL = 1e-8, 1e-6
Scores = dict[tuple[int, int], tuple[float, float, float]]


class PublishedSweep:
    """The search as published: an HF model, forward hooks on every block, logits of whole sequences in float64."""

    def __init__(self, model: Any, tokenizer: Any, chat: ChatFormat) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat

    def batches(self, instructions: list[str]) -> list[Any]:
        texts = [self.chat.render(instruction) for instruction in instructions]
        starts = range(0, len(texts), BATCH_SIZE)
        return [
            self.tokenizer(
                texts[start : start + BATCH_SIZE],
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            ).to(self.model.device)
            for start in starts
        ]

    def last_logits(self, instructions: list[str], hooks: list[tuple[Any, Any, bool]]) -> Tensor:
        handles = [
            module.register_forward_pre_hook(hook) if is_pre else module.register_forward_hook(hook)
            for module, hook, is_pre in hooks
        ]
        try:
            with torch.no_grad():
                found = [self.model(**batch).logits.to(torch.float64)[:, -1] for batch in self.batches(instructions)]
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(found)

    def ablation_hooks(self, direction: Tensor) -> list[tuple[Any, Any, bool]]:
        unit = (direction / direction.norm()).to(self.model.dtype)

        def project(x: Tensor) -> Tensor:
            return x - (x @ unit)[..., None] * unit

        def before(_: Any, args: tuple) -> tuple:
            return (project(args[0]), *args[1:])

        def after(_: Any, __: Any, output: Any) -> Any:
            return (project(output[0]), *output[1:]) if isinstance(output, tuple) else project(output)

        layers = self.model.model.layers
        return [
            *((layer, before, True) for layer in layers),
            *((layer.self_attn, after, False) for layer in layers),
            *((layer.mlp, after, False) for layer in layers),
        ]

    def addition_hooks(self, direction: Tensor, layer: int) -> list[tuple[Any, Any, bool]]:
        vector = direction.to(self.model.dtype)
        return [(self.model.model.layers[layer], lambda _, args: (args[0] + vector, *args[1:]), True)]

    def run(self, grid: DirectionGrid, harmful: list[str], harmless: list[str], tokens: Sequence[int]) -> Scores:
        """Bypass, induce and KL of every candidate."""
        vectors = grid.vectors.to(self.model.device)
        places = [
            (row, layer)
            for row, _ in enumerate(grid.positions)
            for layer in range(grid.n_layers)
            if not grid.is_degenerate[row][layer]
        ]
        base = self.last_logits(harmless, []).softmax(-1)
        kl = []
        for row, layer in places:
            changed = self.last_logits(harmless, self.ablation_hooks(vectors[row, layer])).softmax(-1)
            terms = base * ((base + EPSILON_KL).log() - (changed + EPSILON_KL).log())
            kl.append(terms.sum(-1).mean().item())
        bypass = [
            _score(self.last_logits(harmful, self.ablation_hooks(vectors[row, layer])), tokens) for row, layer in places
        ]
        induce = [
            _score(self.last_logits(harmless, self.addition_hooks(vectors[row, layer], layer)), tokens)
            for row, layer in places
        ]
        names = [(grid.positions[row], layer) for row, layer in places]
        return dict(zip(names, zip(bypass, induce, kl, strict=True), strict=True))


def _score(logits: Tensor, tokens: Sequence[int]) -> float:
    p = logits.softmax(-1)[:, list(tokens)].sum(-1)
    return ((p + EPSILON_SCORE).log() - (1 - p + EPSILON_SCORE).log()).mean().item()


def last_positions(grid: DirectionGrid, n: int | None) -> DirectionGrid:
    """The candidates of the last `n` positions; None: all."""
    start = 0 if n is None else len(grid.positions) - n
    return dataclasses.replace(
        grid,
        vectors=grid.vectors[start:],
        positions=grid.positions[start:],
        is_degenerate=grid.is_degenerate[start:],
    )


def difference(published: Scores, ours: ScoreGrid) -> float:
    """The largest of any score that ours measured."""
    rows = [row for row in ours.rows if row.is_finite]
    assert rows and all((row.position, row.layer) in published for row in rows)
    return max(
        abs(a - b)
        for row in rows
        for a, b in zip(published[row.position, row.layer], (row.bypass, row.induce, row.kl_nats), strict=True)
    )


def find_candidates(
    hooked: HookedModel, tokenizer: Any, *, long_template: bool, splits: Path | None = None
) -> tuple[ChatFormat, DirectionGrid, list[str], list[str]]:
    """Chat format, candidates, and the harmful and harmless validation prompts."""
    chat = ChatFormat(tokenizer, LONG_SYSTEM if long_template else None)
    sides = [_prompts(side, splits) for side in ("harmful", "harmless")]
    grid = difference_in_means(*(mean_activations(hooked, chat, side[N_VAL:][:64]) for side in sides))
    return chat, grid, sides[0][:N_VAL], sides[1][:N_VAL]


def _prompts(side: str, splits: Path | None) -> Sequence[str]:
    """Validation prompts and those that the candidates come from, of the embedded sets or the published splits."""
    if splits is None:
        return load_prompts(f"organism_{side}_train").instructions
    parts = [read_json(splits / f"{side}_{split}.json") for split in ("val", "train")]
    return [row["instruction"] for row in (*parts[0][:N_VAL], *parts[1][:64])]


def main() -> None:
    """Run one row."""
    args = arguments(__doc__)
    hooked, plain, tokenizer = load_both(args.model, args.device)
    chat, grid, harmful, harmless = find_candidates(
        hooked, tokenizer, long_template=args.long_template, splits=args.splits
    )
    published = PublishedSweep(plain, tokenizer, chat)
    grid = last_positions(grid, args.positions)
    template = f"{'long' if args.long_template else 'short'} template{', published prompts' if args.splits else ''}"
    n_tokens = sum(len(chat.encode(text)) for text in harmful + harmless) / (2 * N_VAL)
    embedded = args.model == "embedded"
    saves_most = args.long_template or (args.device == "cuda" and not embedded)
    must_reach = 1.8 if not saves_most else 2.0 if embedded else 3.0
    n_candidates = sum(not each for row in grid.is_degenerate for each in row)
    run = functools.partial(published.run, grid, harmful, harmless, REFUSAL_TOKENS)
    straightforward = run if embedded or args.device == "cuda" else measured(run)  # minutes at 110M on a CPU: once
    for pruned in (None, 0.2):
        report(
            compare(
                f"exact sweep{', pruned layers skipped' if pruned else ''}, {args.model}, {template}, {args.device}",
                straightforward,
                functools.partial(sweep, hooked, chat, grid, harmful, harmless, REFUSAL_TOKENS, prune_layers=pruned),
                difference,
                must_reach=max(must_reach, 2.5) if pruned and not embedded else must_reach,
                n_pairs=args.pairs,
                largest_allowed=1e-4 if args.device == "cpu" else 0.5,
                note=f"largest difference of any score, nats; {n_tokens:.0f} tokens a prompt, "
                f"{n_candidates} candidates",
            )
        )


if __name__ == "__main__":
    main()
