"""The scores of all candidates, as computed and as saved."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .files import read_json


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
