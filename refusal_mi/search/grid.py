"""The scores of all candidates as computed and as saved, the published thresholds, and the choice."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import at_home, read_json, write_json
from ..values import Value, frame, html_table, text_table
from .thresholds import PUBLISHED, CandidateScore, Reason, Thresholds


@dataclass(frozen=True, eq=False, repr=False)
class ScoreGrid(Value):
    """The scores of all candidates, with the unhooked model's for comparison.

    Examples:
        >>> ScoreGrid((CandidateScore(-1, 0, 1.0, 1.0, 0.1),), 1).to_frame()["bypass"].tolist()
        [1.0]
    """

    rows: tuple[CandidateScore, ...]
    n_layers: int
    baseline_harmful: float | None = None
    """Mean refusal score (nats) of the plain model on the harmful validation prompts."""
    baseline_harmless: float | None = None
    per_prompt: Float[Tensor, "candidate measure prompt"] | None = None
    """float64, NaN-padded; measures are bypass, induce, KL, in the order of `rows`. Candidates that the search left out
    have the scores of the prompts that they were screened on."""
    zero_point: float | None = None
    """The refusal score (nats) above which a prompt counts as refused; None where it was not calibrated."""

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted({row.position for row in self.rows}))

    @property
    def _title(self) -> str:
        plain = [f"{side} {value:.2f}" for side, value in zip(SIDES, self.baselines, strict=True) if value is not None]
        about = f"; plain model: {', '.join(plain)}" if plain else ""
        return (
            f"ScoreGrid: {len(self.positions)} positions × {self.n_layers} layers, {len(self.rows)} candidates{about}"
        )

    @property
    def baselines(self) -> tuple[float | None, float | None]:
        """Mean refusal scores of the plain model on harmful and harmless prompts, nats."""
        return self.baseline_harmful, self.baseline_harmless

    def __repr__(self) -> str:
        chosen = select(self)
        return text_table(self._title, _COLUMNS, _cells(chosen.survivors), chosen.explain())

    def _repr_html_(self) -> str:
        chosen = select(self)
        return html_table(self._title, _COLUMNS, _cells(chosen.survivors), chosen.explain())

    def to_frame(self) -> Any:
        """A pandas table with a row for each candidate: its place and scores (nats), and why it was left out.

        Raises:
            UserError: pandas is not installed.
        """
        return frame([asdict(row) for row in self.rows])

    def save(self, path: str | Path) -> None:
        """Write a `direction_evaluations.json` with the published keys, which `load` and `refusal-mi select` read."""
        write_json(at_home(path), [row.describe() for row in self.rows])

    @classmethod
    def load(cls, path: str | Path, n_layers: int) -> "ScoreGrid":
        """Read a `direction_evaluations.json`, ours or a published one (where NaN means no score).

        Raises:
            UserError: the file is missing or has other keys, or a layer that is not below `n_layers`.
        """
        path = at_home(path)
        entries = read_json(path)
        try:
            rows = tuple(map(CandidateScore.read, entries))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            keys = ", ".join(CandidateScore(0, 0, None, None, None).describe())
            raise UserError(f"{path} is not a score grid: expected a list of objects with the keys {keys}") from None
        if not rows:
            raise UserError(f"{path} has no candidates")
        deepest = max(row.layer for row in rows)
        if deepest >= n_layers:
            raise UserError(f"{path} scores layer {deepest}, which a model of {n_layers} layers does not have")
        return cls(rows, n_layers)


SIDES = ("harmful", "harmless")
N_SHOWN = 5
"""Rows of a grid that its representation shows."""
_COLUMNS = ("position", "layer", "bypass", "induce", "KL")


def _cells(rows: Sequence[CandidateScore]) -> list[tuple[str, ...]]:
    number = lambda value: "" if value is None else f"{value:.3f}"  # noqa: E731
    return [
        (f"{row.position}", f"{row.layer}", number(row.bypass), number(row.induce), number(row.kl_nats))
        for row in rows[:N_SHOWN]
    ]


def finite_mean(values: Float[Tensor, " prompt"]) -> float | None:
    """The mean; None where it is not a finite number."""
    mean = values.mean().item()
    return mean if math.isfinite(mean) else None


def median_of(values: Float[Tensor, " prompt"]) -> float:
    """What at least half of the values reach: the median, the higher one of two."""
    return values.sort().values[len(values) // 2].item()


_WORDS: dict[Reason, str] = {
    "no score": "without finite scores",
    "skipped": "left out by the search",
    "layer": "at too late a layer",
    "kl": "with KL above the limit",
    "induce": "that do not induce refusal when added",
}


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Value):
    """The survivors, best first, and the reasons of the others.

    Examples:
        >>> select(scores).best.layer, len(select(scores).survivors) + len(select(scores).rejected) == len(scores.rows)
        (4, True)
    """

    survivors: tuple[CandidateScore, ...]
    """By bypass score, lowest first; rank k is row k."""
    rejected: tuple[tuple[CandidateScore, tuple[Reason, ...]], ...]
    thresholds: Thresholds

    def __repr__(self) -> str:
        return text_table(f"Selection: {self.explain()}", _COLUMNS, _cells(self.survivors))

    def _repr_html_(self) -> str:
        return html_table(f"Selection: {self.explain()}", _COLUMNS, _cells(self.survivors))

    def to_frame(self) -> Any:
        """A pandas table with a row for each survivor, best first, then each other with the rules that it breaks.

        Raises:
            UserError: pandas is not installed.
        """
        kept = [{**asdict(row), "broken": ""} for row in self.survivors]
        return frame([*kept, *({**asdict(row), "broken": ", ".join(why)} for row, why in self.rejected)])

    @property
    def best(self) -> CandidateScore:
        """The chosen candidate.

        Raises:
            UserError: no candidate survives; the message says which threshold binds.
        """
        if not self.survivors:
            raise UserError(f"no candidate survives: {self.explain()}")
        return self.survivors[0]

    def explain(self) -> str:
        """How many candidates survive and what the others fail, in one sentence."""
        total = len(self.survivors) + len(self.rejected)
        failed = Counter(reason for _, reasons in self.rejected for reason in reasons)
        alone = Counter(reasons[0] for _, reasons in self.rejected if len(reasons) == 1)
        notes = {reason: f"{alone[reason]} only that" for reason in _WORDS}
        skipped = Counter(row.why_skipped for row, _ in self.rejected if row.skipped is not None)
        notes["skipped"] = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
        parts = [f"{failed[reason]} {_WORDS[reason]} ({notes[reason]})" for reason in _WORDS if failed[reason]]
        return f"{len(self.survivors)} of {total} candidates survive" + (f"; {', '.join(parts)}" if parts else "")


def select(scores: ScoreGrid, thresholds: Thresholds = PUBLISHED) -> Selection:
    """Apply the thresholds, then rank by bypass score; ties keep the order of the grid.

    Examples:
        >>> rows = (CandidateScore(-1, 2, -5.0, 3.0, 0.01), CandidateScore(-1, 3, -4.0, 3.0, 0.5))
        >>> select(ScoreGrid(rows, n_layers=8)).best.layer
        2
    """
    judged = [(row, thresholds.reasons(row, scores.n_layers, scores.zero_point)) for row in scores.rows]
    kept = [row for row, reasons in judged if not reasons]
    survivors = tuple(sorted(kept, key=lambda row: row.bypass or 0.0))
    return Selection(survivors, tuple((row, reasons) for row, reasons in judged if reasons), thresholds)
