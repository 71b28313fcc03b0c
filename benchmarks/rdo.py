"""Directions found by descent beside the difference of means: `python -m benchmarks.rdo` writes docs/estimators.md.

On the embedded model: fitted to 64 training prompts a side, measured on 100 held-out ones. About 12 minutes.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.export_table import replace_table
from refusal_mi.directions import Direction, difference_in_means
from refusal_mi.estimators.cones import Cone, fit_cone
from refusal_mi.estimators.rdo import Fit, RDOOptions, fit_rdo, retention_loss
from refusal_mi.estimators.repind import dependence, fit_independent
from refusal_mi.files import read_json, write_text
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add, Interventions
from refusal_mi.judges.substring import is_degenerate, is_refusal
from refusal_mi.measures import kl_nats, next_token_logits
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.reading import mean_activations
from refusal_mi.recipes.rdo import own_texts
from refusal_mi.stats import Rate, bootstrap_interval, mean_interval
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"
N_FITTED, N_HELD_OUT, N_RANDOM, NEW_TOKENS = 64, 100, 5, 32
Interval = tuple[float, float, float]


class HeldOut:
    """Held-out prompts, and what a direction does to them."""

    def __init__(self, model: Any, chat: ChatFormat, direction: Direction) -> None:
        self.model, self.chat = model, chat
        self.harmful, self.harmless = (
            load_prompts(f"organism_{side}_test").instructions[:N_HELD_OUT] for side in ("harmful", "harmless")
        )
        self.plain = next_token_logits(model, chat, self.harmless)
        self.answers = own_texts(model, chat, direction, self.harmful[:1], self.harmless).retained
        self.first = self.kl(direction)[0].tolist()
        self.chosen, self.n_degenerate = direction, 0

    def kl(self, direction: Direction) -> tuple[torch.Tensor, torch.Tensor]:
        """Of harmless prompts with the direction ablated: at the first token, and the mean over the plain answer."""
        changed = next_token_logits(self.model, self.chat, self.harmless, interventions=Ablate(direction))
        with torch.no_grad():
            each = [retention_loss(self.model, [text], self.chat.pad_id)(direction.unit) for text in self.answers]
        return kl_nats(self.plain, changed), torch.stack(each)

    def texts(self, side: str, interventions: Interventions) -> list[str]:
        """Answers."""
        prompts = getattr(self, side)
        how = {"max_new_tokens": NEW_TOKENS, "batch_size": 50}
        return [each.text for each in generate(self.model, self.chat, prompts, interventions=interventions, **how)]

    def row(self, name: str, direction: Direction, seconds: float | None = None) -> str:
        """A line of the table."""
        ablated, added = self.texts("harmful", Ablate(direction)), self.texts("harmless", Add(direction))
        first, answer = (values.tolist() for values in self.kl(direction))
        ratio = bootstrap_interval(first, self.first, statistic=lambda a, b: a.mean(-1) / b.mean(-1))
        self.n_degenerate += sum(map(is_degenerate, [*ablated, *added]))
        cells = [
            name,
            str(Rate.of(list(map(is_refusal, ablated)))),
            str(Rate.of(list(map(is_refusal, added)))),
            _number(mean_interval(first), 4),
            "1" if direction is self.chosen else _number(ratio, 2),
            _number(mean_interval(answer), 5),
            f"{(direction.unit @ self.chosen.unit).item():.2f}",
            "–" if seconds is None else f"{seconds:.0f}",
        ]
        sys.stderr.write(line := _line(cells))
        return line


def _number(interval: Interval, digits: int) -> str:
    return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*interval, n=digits)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _timed(work: Callable[[], Fit]) -> tuple[Fit, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> None:
    """Fit, measure and write."""
    torch.set_num_threads(1)
    model = load_model()
    chat = ChatFormat(model.tokenizer)
    train = [load_prompts(f"organism_{side}_train").instructions for side in ("harmful", "harmless")]
    grid = difference_in_means(*(mean_activations(model, chat, side[:128]) for side in train))
    chosen = read_json(ORGANISM.parent / "metrics.json")["selected"]
    start = grid.direction(chosen["position"], chosen["layer"])
    texts, held_out = own_texts(model, chat, start, *(side[:N_FITTED] for side in train)), HeldOut(model, chat, start)
    coded = RDOOptions(retention_form="code")

    heads = ["direction", "harmful refused, ablated", "harmless refused, added"]
    heads += ["KL, first token", "of the first row's", "KL, 30 tokens", "cosine", "seconds"]
    lines = [_line(heads), f"{'|---' * len(heads)}|\n", held_out.row("`mean`, as chosen", start)]
    for seed in range(N_RANDOM):
        lines.append(held_out.row(f"random direction {seed}", start.random_like(seed)))
    fits: dict[str, Callable[[], Fit]] = {
        "RDO, retention as in the paper": lambda: fit_rdo(model, chat, start, texts),
        "RDO, retention as in the code": lambda: fit_rdo(model, chat, start, texts, coded),
        "the same from a random start": lambda: fit_rdo(model, chat, start.random_like(0), texts, coded),
    }
    for name, fit in fits.items():
        found, seconds = _timed(fit)
        lines.append(held_out.row(f"{name} ({len(found.losses)} steps)", found.direction, seconds))

    few = replace(coded, n_steps=30, texts_per_step=8)
    pair, seconds = _timed(lambda: fit_cone(model, chat, start, texts, few, n_directions=2, n_samples=2))
    lines += [
        held_out.row(f"cone of two, direction {index}", each, seconds) for index, each in enumerate(pair.directions)
    ]
    lines += [
        held_out.row(f"cone of two, mixture {index}", each)
        for index, each in enumerate(Cone(pair.directions).sample(4))
    ]
    alone, seconds = _timed(
        lambda: fit_independent(
            model, chat, start.random_like(0), texts, [start], RDOOptions(retention=0.1, n_steps=60, texts_per_step=8)
        )
    )
    lines.append(held_out.row("RepInd of `mean`, from a random start", alone.direction, seconds))
    table = dependence(model, chat, [start, alone.direction, start.random_like(1)], held_out.harmful)
    lines.append(f"\nDegenerate answers in all of it: {held_out.n_degenerate}.\n")
    write_text(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), "rdo", "".join(lines)))
    names = ["`mean`", "RepInd", "random"]
    rows = [_line(["ablated ↓, read →", *names]), f"{'|---' * 4}|\n"]
    rows += [_line([name, *(f"{value:.4f}" for value in row)]) for name, row in zip(names, table.tolist(), strict=True)]
    write_text(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), "repind", "".join(rows)))


if __name__ == "__main__":
    main()
