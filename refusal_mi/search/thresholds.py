"""What is measured of a candidate direction, what a search asks of it, and how it goes through the candidates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..options import MEANINGS, Option

Search = Literal["exact", "staged"]
"""exact: every candidate on every validation prompt; staged: only those that can win."""
Reason = Literal["no score", "skipped", "layer", "kl", "induce"]


def most(value: float) -> float | None:
    """A largest value; inf is none."""
    return None if value == math.inf else value


def least(value: float) -> float | None:
    """A smallest value; -inf is none."""
    return None if value == -math.inf else value


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
    """Why there are no scores, where the search left the candidate out; what was measured follows after a colon."""
    median_induce: float | None = None
    """What at least half of the prompts of `induce` reach (nats); None in published files."""

    @property
    def why_skipped(self) -> str:
        """`skipped` without what was measured."""
        return (self.skipped or "").partition(":")[0]

    @property
    def is_finite(self) -> bool:
        """Whether all three scores are numbers."""
        return all(value is not None and math.isfinite(value) for value in (self.bypass, self.induce, self.kl_nats))

    def describe(self) -> dict[str, float | int | str | None]:
        """The published row, with what is our own where it is known."""
        own = {"steering_score_median": self.median_induce, "skipped": self.skipped}
        return {
            "position": self.position,
            "layer": self.layer,
            "refusal_score": self.bypass,
            "steering_score": self.induce,
            "kl_div_score": self.kl_nats,
            **{key: value for key, value in own.items() if value is not None},
        }

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "CandidateScore":
        """Read a published row; a value that is not finite is no score."""
        values = [*(row[key] for key in ("refusal_score", "steering_score", "kl_div_score"))]
        values.append(row.get("steering_score_median"))
        bypass, induce, kl, median = [None if x is None or not math.isfinite(x) else float(x) for x in values]
        return cls(int(row["position"]), int(row["layer"]), bypass, induce, kl, row.get("skipped"), median)


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must satisfy; the defaults are the published ones. None switches a rule off.

    Examples:
        >>> Thresholds(kl_max=0.2)
        Thresholds(kl_max=0.2, induce_min=0.0, prune_layers=0.2)
    """

    kl_max: Annotated[
        float | None,
        Option(
            MEANINGS["kl_max"],
            takes=float,
            own_default=True,
            read=most,
            write=lambda value: "inf" if value is None else str(value),
        ),
    ] = 0.1
    """Mean KL; equality passes."""
    induce_min: Annotated[
        float | None,
        Option(
            "Smallest refusal score under addition, in nats above the zero point; -inf: any.",
            takes=float,
            read=least,
            write=lambda value: "-inf" if value is None else str(value),
        ),
    ] = 0.0
    """Mean refusal score, as published; where a zero point was calibrated, the median, counted from there. Equality
    passes."""
    prune_layers: Annotated[
        float | None,
        Option(
            "Fraction of last layers left out.",
            takes=float,
            write=lambda value: "0" if value is None else str(value),
        ),
    ] = 0.2
    """layer < int(n_layers · (1 − prune_layers))"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, or None for no such rule, not {value}")
        if self.prune_layers is not None and not 0 <= self.prune_layers < 1:
            raise UserError(f"prune_layers is a fraction of the layers, 0 <= f < 1, not {self.prune_layers}")
        if self.kl_max is not None and self.kl_max < 0:
            raise UserError(f"kl_max must not be negative, not {self.kl_max}")

    def induce_floor(self, zero_point: float | None) -> float:
        """The smallest refusal score under addition that passes, in nats."""
        return -math.inf if self.induce_min is None else (zero_point or 0.0) + self.induce_min

    def reasons(self, row: CandidateScore, n_layers: int, zero_point: float | None = None) -> tuple[Reason, ...]:
        """Every rule that a candidate breaks; empty if it survives.

        Args:
            zero_point: the refusal score (nats) above which a prompt counts as refused: at least half of the harmless
                prompts must reach it (plus `induce_min`) under addition. None is the published rule: their mean must
                reach `induce_min`.
        """
        broken: list[Reason] = []
        if not row.is_finite:
            return ("no score" if row.skipped is None else "skipped",)
        assert row.kl_nats is not None and row.induce is not None
        if self.prune_layers is not None and row.layer >= layer_limit(n_layers, self.prune_layers):
            broken.append("layer")
        if self.kl_max is not None and row.kl_nats > self.kl_max:
            broken.append("kl")
        induce = row.induce if zero_point is None or row.median_induce is None else row.median_induce
        if induce < self.induce_floor(zero_point):
            broken.append("induce")
        return tuple(broken)


PUBLISHED = Thresholds()
NO_THRESHOLDS = Thresholds(kl_max=None, induce_min=None, prune_layers=None)
"""Ranks every candidate that has a score."""


Rule = Annotated[Thresholds, Option("Apply them; without, rank all.", off=NO_THRESHOLDS)]


def layer_limit(n_layers: int, prune_layers: float | None) -> int:
    """The first layer that is pruned: int(n_layers · (1 − prune_layers)); None prunes none."""
    return n_layers if prune_layers is None else int(n_layers * (1.0 - prune_layers))
