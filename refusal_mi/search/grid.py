"""The scores of all candidates as computed and as saved, the published thresholds, and the choice."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import read_json


@dataclass(frozen=True)
class CandidateScore:
    """What ablating and adding one candidate does; None where its two means do not differ or a mean is not finite."""

    position: int
    layer: int
    bypass: float | None
    """Mean refusal score (nats) on harmful prompts under ablation: lower is better."""
    induce: float | None
    """Mean refusal score (nats) on harmless prompts with the raw direction added at its layer: higher is better."""
    kl_nats: float | None
    """Mean next-token KL(plain ‖ ablated) on harmless prompts: lower is better."""
    skipped: str | None = None
    """Why there are no scores, where the search left the candidate out."""

    @property
    def is_finite(self) -> bool:
        """Whether all three scores are numbers."""
        return all(value is not None and math.isfinite(value) for value in (self.bypass, self.induce, self.kl_nats))

    def describe(self) -> dict[str, float | int | str | None]:
        """The published row, with the reason where the search left the candidate out."""
        reason = {} if self.skipped is None else {"skipped": self.skipped}
        return {
            "position": self.position,
            "layer": self.layer,
            "refusal_score": self.bypass,
            "steering_score": self.induce,
            "kl_div_score": self.kl_nats,
            **reason,
        }


@dataclass(frozen=True)
class ScoreGrid:
    """The scores of all candidates, with the unhooked model's for comparison."""

    rows: tuple[CandidateScore, ...]
    n_layers: int
    baseline_harmful: float | None = None
    """Mean refusal score (nats) of the plain model on the harmful validation prompts."""
    baseline_harmless: float | None = None
    per_prompt: Float[Tensor, "candidate measure prompt"] | None = None
    """float64, NaN-padded; measures are bypass, induce, KL, in the order of `rows`."""

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted({row.position for row in self.rows}))

    @classmethod
    def load(cls, path: Path, n_layers: int) -> "ScoreGrid":
        """Read a `direction_evaluations.json`, ours or a published one (where NaN means no score).

        Raises:
            UserError: the file is missing or has other keys, or a layer that is not below `n_layers`.
        """
        entries = read_json(path)
        try:
            rows = tuple(_read_row(entry) for entry in entries)
        except (KeyError, TypeError, ValueError):
            keys = ", ".join(CandidateScore(0, 0, None, None, None).describe())
            raise UserError(f"{path} is not a score grid: expected a list of objects with the keys {keys}") from None
        if not rows:
            raise UserError(f"{path} has no candidates")
        deepest = max(row.layer for row in rows)
        if deepest >= n_layers:
            raise UserError(f"{path} scores layer {deepest}, which a model of {n_layers} layers does not have")
        return cls(rows, n_layers)


def layer_limit(n_layers: int, prune_layers: float | None) -> int:
    """The first layer that is pruned: int(n_layers · (1 − prune_layers)); None prunes none."""
    return n_layers if prune_layers is None else int(n_layers * (1.0 - prune_layers))


def finite_mean(values: Float[Tensor, " prompt"]) -> float | None:
    """The mean; None where it is not a finite number."""
    mean = values.mean().item()
    return mean if math.isfinite(mean) else None


def _read_row(entry: dict[str, Any]) -> CandidateScore:
    values = [entry[key] for key in ("refusal_score", "steering_score", "kl_div_score")]
    finite = [None if value is None or not math.isfinite(value) else float(value) for value in values]
    bypass, induce, kl = finite
    return CandidateScore(int(entry["position"]), int(entry["layer"]), bypass, induce, kl, entry.get("skipped"))


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
