"""What people do to weights, measured: `python -m benchmarks.edits RUN [MODEL]` writes a table of docs/export.md.

RUN is the folder of a finished `refusal-mi run`; MODEL where it was made of another than the embedded one. Sources of
directions times ways to edit a matrix: about a minute on the embedded model, half an hour on one of 0.5B.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.export_table import replace_table
from refusal_mi.estimators.location import projected_difference
from refusal_mi.files import read_record, read_tensors, write_text
from refusal_mi.interventions import Ablate
from refusal_mi.measures import ce_loss, kl_nats, next_token_logits, texts_to_score
from refusal_mi.model.held import parts_of
from refusal_mi.model.loading import load_model
from refusal_mi.model.provenance import display_name
from refusal_mi.model.writers import build_skeleton, classify
from refusal_mi.recipes.localize import Judged, judged_answers
from refusal_mi.run.folder import RunInputs
from refusal_mi.run.record import MEANS, RUN, RunInfo
from refusal_mi.stats import Paired, Rate, bootstrap_interval, mean_interval, signed
from refusal_mi.text.prompts import load_prompts

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
HEADERS = ("direction", "edit", "left of it", "left along r", "weights", "refused", "to the first row")
HEADERS += ("KL (nats)", "of the first row's", "CE", "degenerate")
N_PROMPTS, N_TEXTS, N_RANDOM, NEW_TOKENS = 100, 64, 5, 64

Matrix = Float[Tensor, "d_model columns"]
Edit = Callable[[Matrix, Float[Tensor, " d_model"]], Matrix]


def orthogonal(w: Matrix, r: Float[Tensor, " d_model"]) -> Matrix:
    """W − r rᵀW."""
    return w - torch.outer(r, r @ w)


def rows_kept(w: Matrix, r: Float[Tensor, " d_model"]) -> Matrix:
    """Rows to length 1, orthogonalised, to length 1 again, and back to their lengths."""
    lengths = w.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.nn.functional.normalize(orthogonal(w / lengths, r), dim=1) * lengths


def rows_kept_then_orthogonal(w: Matrix, r: Float[Tensor, " d_model"]) -> Matrix:
    """The same, and what it puts back along r taken out again."""
    return orthogonal(rows_kept(w, r), r)


def columns_kept(w: Matrix, r: Float[Tensor, " d_model"]) -> Matrix:
    """Orthogonalised; every column, what one input writes, at its length from before."""
    return torch.nn.functional.normalize(orthogonal(w, r), dim=0) * w.norm(dim=0)


EDITS: dict[str, Edit] = {
    "W − r rᵀW": orthogonal,
    "row norms kept": rows_kept,
    "row norms kept, then r out": rows_kept_then_orthogonal,
    "column norms kept": columns_kept,
}


@dataclass(frozen=True)
class Held:
    """A weight or bias of an attention or MLP output, as the model holds it."""

    tensor: Tensor
    axis: int
    """Along which it writes."""
    block: int

    @property
    def rows(self) -> Matrix:
        """A view with the axis that writes first; of a bias its one column."""
        return self.tensor[:, None] if self.tensor.ndim == 1 else self.tensor if self.axis == 0 else self.tensor.T


def writers_of(model: Any) -> dict[str, Held]:
    """By name.

    Raises:
        SystemExit: a norm follows them, or they are stacked experts: these edits say nothing of either.
    """
    parts = parts_of(model)
    skeleton = build_skeleton(parts.config)
    shapes = {name: tuple(each.shape) for name, each in skeleton.named_parameters()}
    layout = classify(parts.config, shapes, skeleton=skeleton)
    writers = [each for each in layout.writers if each.component != "embed"]
    if any(each.post_norm or len(shapes[each.name]) > 2 for each in writers):
        raise SystemExit("this table is of matrices that write into the stream by themselves")
    return {each.name: Held(parts.tensors[each.name], each.axis, each.layer or 0) for each in writers}


@dataclass(frozen=True)
class Edited:
    """One matrix in float64: before, and after the edit and rounding; what was removed from it."""

    before: Matrix
    after: Matrix
    vector: Float[Tensor, " d_model"]


@contextmanager
def edited(model: Any, edit: Edit, vectors: "Vectors") -> Iterator[list[Edited]]:
    """The model with its matrices edited in place, and their biases projected; afterwards it is what it was."""
    writers = writers_of(model)
    kept = {name: held.tensor.clone() for name, held in writers.items()}
    found = []
    try:
        for held in writers.values():
            before, vector = held.rows.double(), vectors.at_block(held.block)
            with torch.no_grad():
                held.rows.copy_((edit if held.tensor.ndim == 2 else orthogonal)(before, vector))
            if held.tensor.ndim == 2:
                found.append(Edited(before, held.rows.double(), vector))
        yield found
    finally:
        with torch.no_grad():
            for name, held in writers.items():
                held.tensor.copy_(kept[name])


@dataclass(frozen=True)
class Vectors:
    """One unit vector for all writes, or one for each stream that is written into."""

    name: str
    units: Mapping[int, Float[Tensor, " d_model"]] = field(repr=False)
    """Layer -> vector; the embedding writes into layer 0, block b into layer b + 1. One under −1 is for all."""

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """For writes into a layer's stream."""
        return self.units[-1] if -1 in self.units else self.units[layer]

    def at_block(self, block: int) -> Float[Tensor, " d_model"]:
        """For what a block writes."""
        return self.at(block + 1)


def vectors_of(run: RunInputs) -> list[Vectors]:
    """Difference of means, projected, biprojected: at the place of the run's direction."""
    means, place = read_tensors(run.path / MEANS), run.direction
    assert place.position is not None
    harmful, harmless = (means[side][place.position] for side in ("harmful", "harmless"))
    here = harmful[place.layer], harmless[place.layer]
    r, single = here[0] - here[1], projected_difference(*here)
    last = len(harmless) - 1  # of the stream after the last block there is no mean: the one before stands for it
    targets = {layer: harmless[min(layer, last)] for layer in range(last + 2)}
    twice = {layer: _unit(without(r, torch.stack([here[1], mean]))) for layer, mean in targets.items()}
    return [
        Vectors("`mean`", {-1: _unit(r)}),
        Vectors("`projected`", {-1: _unit(single)}),
        Vectors("biprojected", twice),
    ]


def without(vector: Float[Tensor, " d_model"], span: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_model"]:
    """The part of a vector outside of a span."""
    rows, wide = span.double(), vector.double()
    return wide - rows.T @ torch.linalg.lstsq(rows.T, wide, driver="gelsd").solution


def _unit(vector: Tensor) -> Tensor:
    return vector.double() / vector.double().norm()


@dataclass(frozen=True)
class Row:
    """What an edited model does."""

    vectors: str
    edit: str
    left_own: float
    """‖vᵀW′‖ / ‖vᵀW‖ over all matrices, v what was removed from each."""
    left_along_r: float
    """The same of the difference of means."""
    changed: float
    """‖W′ − W‖ / ‖W‖."""
    judged: Judged | None
    kl: tuple[float, ...]
    ce: float


class HeldOut:
    """Held-out prompts of a run, and the edits measured on them."""

    def __init__(self, run: RunInputs, *, new_tokens: int = NEW_TOKENS) -> None:
        self.run, self.r = run, vectors_of(run)[0].units[-1]
        self.harmful, self.harmless = run.prompts("harmful"), run.prompts("harmless")
        texts = load_prompts(run.options.text_set, limit=N_TEXTS)
        self.texts = texts_to_score(run.chat, texts.sample(min(N_TEXTS, len(texts)), run.options.seed).instructions)
        self.judge = judged_answers(run, self.harmful, new_tokens)
        self.logits = next_token_logits(run.model, run.chat, self.harmless)
        self.plain = self._row("none", "–", [], [])

    def row(self, vectors: Vectors, name: str, *, read: bool = True) -> Row:
        """One source under one edit: matrices edited, the embedding's writes projected by a hook.

        Args:
            read: whether answers are written and judged.
        """
        with edited(self.run.model, EDITS[name], vectors) as matrices:
            steps = [Ablate(vectors.at(0), components=("embed",))]
            return self._row(vectors.name, name, steps, matrices, read=read)

    def _row(self, vectors: str, name: str, steps: list[Ablate], matrices: list[Edited], *, read: bool = True) -> Row:
        run = self.run
        logits = next_token_logits(run.model, run.chat, self.harmless, interventions=steps)
        own, along_r, change = (
            _ratio(each)
            for each in (
                [(each.vector @ each.after, each.vector @ each.before) for each in matrices],
                [(self.r @ each.after, self.r @ each.before) for each in matrices],
                [(each.after - each.before, each.before) for each in matrices],
            )
        )
        kl, loss = kl_nats(self.logits, logits), ce_loss(run.model, run.chat, self.texts, interventions=steps)
        judged = self.judge(steps) if read else None
        return Row(vectors, name, own, along_r, change, judged, tuple(kl.tolist()), loss.ce_loss)


def _ratio(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Root of the summed squares of the first of each over that of the second; 0 of nothing."""
    above, below = (sum(pair[i].square().sum().item() for pair in pairs) for i in (0, 1))
    return float((above / below) ** 0.5) if pairs else 0.0


def table(held_out: HeldOut, n_random: int = N_RANDOM) -> list[str]:
    """Markdown: a row for each source and edit; then what vectors do that nothing chose, from the least to the most."""
    plain, found = held_out.plain, vectors_of(held_out.run)
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|", _line([plain], None, plain)]
    first: Row | None = None
    for vectors in found:
        for name in EDITS:
            row = held_out.row(vectors, name)
            first = row if first is None else first
            lines.append(_line([row], first, plain))
            sys.stderr.write(lines[-1] + "\n")
    cosine = (held_out.r @ found[1].units[-1]).item()
    units = [held_out.run.direction.random_like(seed).unit for seed in range(n_random)]
    drawn = {f"{n_random} as far from `mean` as `projected`": [tilted(held_out.r, each, cosine) for each in units]}
    drawn[f"{n_random} random"] = units
    for label, several in drawn.items():
        for name in EDITS:
            made = [Vectors(label, {-1: each}) for each in several]
            rows = [held_out.row(each, name, read=index == 0) for index, each in enumerate(made)]
            lines.append(_line(rows, first, plain))
            sys.stderr.write(lines[-1] + "\n")
    return lines


def tilted(r: Float[Tensor, " d_model"], other: Float[Tensor, " d_model"], cosine: float) -> Float[Tensor, " d_model"]:
    """A unit vector of this cosine with a unit vector, tilted toward another."""
    return cosine * r + (1 - cosine**2) ** 0.5 * _unit(other - (other @ r) * r)


def _line(rows: list[Row], first: Row | None, plain: Row) -> str:
    """One edit with its intervals; of several what they span, answers those of the first."""
    row, judged = rows[0], rows[0].judged
    assert judged is not None
    cells = [row.vectors, row.edit, *(["–"] * 3), str(Rate.of(judged.refused)), "", "0", "", ""]
    if first is not None and first.judged is not None:
        against = "" if row is first else str(Paired.of(first.judged.refused, judged.refused))
        kl, base = [mean_interval(each.kl)[0] for each in rows], mean_interval(first.kl)[0]
        cost = span(kl, 4), span([each / base for each in kl], 2)
        if len(rows) == 1:
            ratio = bootstrap_interval(row.kl, first.kl, statistic=lambda a, b: a.mean(-1) / b.mean(-1))
            cost = "{:.4f} [{:.4f}, {:.4f}]".format(*mean_interval(row.kl)), "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
        cells[2:5] = [span([getattr(each, name) for each in rows], 2) for name in ("left_own", "left_along_r")] + [
            span([each.changed for each in rows], 3)
        ]
        cells[6:10] = [
            against,
            *cost,
            " to ".join(dict.fromkeys(signed(each.ce - plain.ce, 3) for each in _ends(rows))),
        ]
    return "| " + " | ".join([*cells, str(sum(judged.degenerate))]) + " |"


def _ends(rows: list[Row]) -> tuple[Row, Row]:
    return min(rows, key=lambda each: each.ce), max(rows, key=lambda each: each.ce)


def span(values: list[float], digits: int) -> str:
    """The least and the most, one where they read the same; no digits of what is rounding."""
    shown = ["0" if abs(each) < 1e-5 else f"{each:.{digits}f}" for each in (min(values), max(values))]
    return " to ".join(dict.fromkeys(shown))


def main(path: str, source: str | None = None) -> None:
    """Write the table of a run under the marker of its model's name."""
    torch.set_num_threads(1)
    run = RunInputs(load_model(source), path, N_PROMPTS)
    name = read_record(run.path / RUN, RunInfo).model.source
    lines = table(HeldOut(run))
    mark = f"edits: {display_name(name)}"
    write_text(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), mark, "\n".join(lines) + "\n"))


if __name__ == "__main__":
    main(*sys.argv[1:])
