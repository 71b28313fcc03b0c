"""The published rule that picks one direction from the scores, and why every other candidate lost."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from .errors import UserError
from .score_grid import CandidateScore, ScoreGrid, layer_limit

Reason = Literal["no score", "skipped", "layer", "kl", "induce"]

_WORDS: dict[Reason, str] = {
    "no score": "without finite scores",
    "skipped": "left out by the search",
    "layer": "at too late a layer",
    "kl": "with KL above the limit",
    "induce": "that do not induce refusal when added",
}


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must satisfy; the defaults are the published ones. None switches a rule off."""

    kl_max: float | None = 0.1
    """Largest mean KL on harmless prompts (nats); equality passes."""
    induce_min: float | None = 0.0
    """Smallest mean refusal score under addition (nats); equality passes."""
    prune_layers: float | None = 0.2
    """Fraction of last layers left out: layer < int(n_layers · (1 − prune_layers))."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, or None for no such rule, not {value}")
        if self.prune_layers is not None and not 0 <= self.prune_layers < 1:
            raise UserError(f"prune_layers is a fraction of the layers, 0 <= f < 1, not {self.prune_layers}")
        if self.kl_max is not None and self.kl_max < 0:
            raise UserError(f"kl_max must not be negative, not {self.kl_max}")

    def reasons(self, row: CandidateScore, n_layers: int) -> tuple[Reason, ...]:
        """Every rule that a candidate breaks; empty if it survives."""
        broken: list[Reason] = []
        if not row.is_finite:
            return ("no score" if row.skipped is None else "skipped",)
        assert row.kl_nats is not None and row.induce is not None
        if self.prune_layers is not None and row.layer >= layer_limit(n_layers, self.prune_layers):
            broken.append("layer")
        if self.kl_max is not None and row.kl_nats > self.kl_max:
            broken.append("kl")
        if self.induce_min is not None and row.induce < self.induce_min:
            broken.append("induce")
        return tuple(broken)


NO_THRESHOLDS = Thresholds(kl_max=None, induce_min=None, prune_layers=None)
"""Ranks every candidate that has a score."""


@dataclass(frozen=True)
class Selection:
    """The survivors, best first, and the reasons of the others."""

    survivors: tuple[CandidateScore, ...]
    """By bypass score, lowest first; rank k is row k."""
    rejected: tuple[tuple[CandidateScore, tuple[Reason, ...]], ...]
    thresholds: Thresholds

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
        parts = [
            f"{failed[reason]} {_WORDS[reason]} ({alone[reason]} only that)" for reason in _WORDS if failed[reason]
        ]
        return f"{len(self.survivors)} of {total} candidates survive" + (f"; {', '.join(parts)}" if parts else "")


def select(scores: ScoreGrid, thresholds: Thresholds = Thresholds()) -> Selection:
    """Apply the thresholds, then rank by bypass score; ties keep the order of the grid."""
    judged = [(row, thresholds.reasons(row, scores.n_layers)) for row in scores.rows]
    kept = [row for row, reasons in judged if not reasons]
    survivors = tuple(sorted(kept, key=lambda row: row.bypass or 0.0))
    return Selection(survivors, tuple((row, reasons) for row, reasons in judged if reasons), thresholds)
