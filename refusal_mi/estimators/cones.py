"""Cones of refusal directions (Wollschläger et al. 2025): several orthogonal ones, all of whose mixtures work too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..model.points import HookedModel
from ..text.chat import ChatFormat
from ..values import Value
from .descent import orthonormal
from .rdo import Fit, RDOOptions, RDOTexts, Spread, as_they_are, fit_terms, rdo_terms

N_SAMPLES = 8
"""Mixtures at every step."""
LARGEST_OVERLAP = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Cone(Value):
    """All mixtures with nonnegative weights of orthogonal directions of one place.

    One of them is ablated or added at a time. What ablates all at once is `Ablate(cone.directions)`.

    Examples:
        >>> one, another = (Direction(row, 2, "blocks.2.hook_resid_pre", -1) for row in 2 * torch.eye(2))
        >>> Cone((one, another)).mix([3, 4]).unit.round(decimals=6).tolist()
        [0.6, 0.8]
        >>> [bool((each.vector >= 0).all()) for each in Cone((one, another)).sample(2)]
        [True, True]
    """

    directions: tuple[Direction, ...]

    def __post_init__(self) -> None:
        if not self.directions or len({each.layer for each in self.directions}) > 1:
            raise UserError("a cone needs at least one direction, and all of one layer")
        units = self.basis
        if ((units @ units.T) - torch.eye(len(units), dtype=units.dtype)).abs().max() > LARGEST_OVERLAP:
            raise UserError("the directions of a cone must be orthogonal: see estimators.descent.orthonormal")

    @property
    def basis(self) -> Float[Tensor, "n d_model"]:
        """The unit directions, float64."""
        return torch.stack([each.unit for each in self.directions])

    def mix(self, weights: Sequence[float | int]) -> Direction:
        """The direction of these weights, as long as the first one.

        Raises:
            UserError: they are not one for each direction, some are negative, or none is positive.
        """
        if len(weights) != len(self.directions) or min(weights) < 0 or not sum(weights) > 0:
            raise UserError(f"a mixture needs {len(self.directions)} weights, none of them negative and not all 0")
        first = self.directions[0]
        mixed = torch.tensor(list(weights), dtype=torch.float64) @ self.basis
        vector = (mixed * (first.norm / mixed.norm())).to(first.vector.dtype)
        provenance = {key: value for key, value in first.provenance.items() if key != "row"}
        return replace(first, vector=vector, provenance=provenance | {"mixture": list(weights)})

    def sample(self, n: int, *, seed: int = 42) -> list[Direction]:
        """Mixtures drawn evenly from the nonnegative part of the sphere."""
        return [self.mix(weights) for weights in mixtures(len(self.directions), n, seed).tolist()]


def mixtures(n_directions: int, n: int, seed: int) -> Float[Tensor, "n n_directions"]:
    """Weights of length 1: |N(0, I)|, normalised.

    Examples:
        >>> weights = mixtures(2, 5, seed=0)
        >>> weights.norm(dim=-1).round(decimals=6).tolist() == [1.0] * 5, bool((weights >= 0).all())
        (True, True)
    """
    drawn = torch.randn(n, n_directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    return drawn / drawn.norm(dim=-1, keepdim=True)


def fit_cone(
    model: HookedModel,
    chat: ChatFormat,
    start: Direction | Cone,
    texts: RDOTexts,
    options: RDOOptions | None = None,
    *,
    n_directions: int,
    n_samples: int = N_SAMPLES,
    orthogonal_to: Sequence[Direction] = (),
    checkpoint: str | Path | None = None,
) -> Fit:
    """Orthogonal directions of which each, and each mixture, has a low RDO loss; `Cone(fit.directions)` mixes them.

    L = mean over mixtures of the RDO loss + mean over the directions of it. Mixtures are drawn anew at every step,
    seeded. Every text takes a pass for each mixture and each direction.

    Examples:
        >>> found = fit_cone(model, chat, direction, texts, RDOOptions(n_steps=1), n_directions=2, n_samples=1)
        >>> one, another = found.directions
        >>> abs(one.unit @ another.unit).item() < 1e-6, len(Cone(found.directions).sample(3))
        (True, 3)

    Args:
        start: a direction, or a cone of fewer, as published; the missing directions start at random, seeded.
        n_samples: mixtures at every step.
        orthogonal_to: directions that all must stay orthogonal to.
        checkpoint: a `.pt` file to go on from, written after every step.

    Raises:
        UserError: there are not enough directions to start from, or as `fit_rdo` says.
    """
    options = RDOOptions() if options is None else options
    given = start if isinstance(start, Cone) else Cone((start,))
    n_new, width = n_directions - len(given.directions), given.basis.shape[1]
    if n_new < 0 or n_directions > width or n_samples < 1:
        raise UserError(
            f"a cone of {n_directions} directions cannot start from {len(given.directions)} of width {width} with "
            f"{n_samples} mixtures a step"
        )
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.cat([given.basis, torch.randn(n_new, width, generator=generator, dtype=torch.float64)])
    first = given.directions[0]
    spread = as_they_are if n_directions == 1 else mixed_with(n_samples, options.seed)
    return fit_terms(
        model,
        rdo_terms(model, chat, first, texts, options),
        first,
        orthonormal(rows),
        options,
        f"cone of {n_directions} directions, {n_samples} mixtures a step",
        spread=spread,
        orthogonal_to=orthogonal_to,
        checkpoint=checkpoint,
    )


def mixed_with(n_samples: int, seed: int) -> Spread:
    """The rows, counting one together, and mixtures of them, counting one together."""

    def spread(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        weights = mixtures(len(rows), n_samples, seed * 1_000_003 + step)
        counts = [rows.new_full((n,), 1 / n) for n in (n_samples, len(rows))]
        return torch.cat([weights.to(rows) @ rows, rows]), torch.cat(counts)

    return spread
