"""Class centres that few prompts cannot move, and the differences between them."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError

MOST_STEPS = 10_000
TOLERANCE = 1e-10
"""A step, or a distance to a prompt's own row, below this fraction of the median distance is none."""


def geometric_median(rows: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " d_model"]:
    """argmin_m Σ_i ‖x_i − m‖, by Weiszfeld's steps; at a row itself by those of Vardi and Zhang (2000).

    Half of the rows would have to be moved for the median to move without bound; of a mean, one.

    Examples:
        >>> geometric_median(torch.tensor([[0.0], [1.0], [50.0]])).round(decimals=3).tolist()
        [1.0]

    Raises:
        UserError: 10,000 steps did not settle it.
    """
    x = rows.double()
    median = x.mean(0)
    for _ in range(MOST_STEPS):
        moved = _weiszfeld_step(x, median)
        scale = (x - moved).norm(dim=-1).median()
        if (moved - median).norm() <= TOLERANCE * scale:
            return moved
        median = moved
    raise UserError(f"the geometric median of {len(x)} prompts did not settle in {MOST_STEPS} steps: leave out repeats")


def _weiszfeld_step(x: Float[Tensor, "prompt d_model"], median: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    distances = (x - median).norm(dim=-1)
    is_here = distances <= TOLERANCE * distances.median()
    weights = torch.where(is_here, 0.0, 1 / distances.masked_fill(is_here, 1.0))
    if not bool(weights.any()):
        return median
    elsewhere = weights @ x / weights.sum()
    if not bool(is_here.any()):
        return elsewhere
    pull = (weights @ (x - median)).norm()
    stay = 1.0 if pull == 0 else min(1.0, (is_here.sum() / pull).item())
    return (1 - stay) * elsewhere + stay * median


def winsorised_mean(rows: Float[Tensor, "prompt d_model"], quantile: float = 0.95) -> Float[Tensor, " d_model"]:
    """Mean over prompts after every coordinate is clamped to its own quantiles 1 − q and q over the prompts (Tukey).

    Examples:
        >>> winsorised_mean(torch.tensor([[0.0], [1.0], [50.0]]), quantile=0.75).tolist()
        [9.0]
    """
    check_quantile(quantile)
    x = rows.double()
    low, high = torch.quantile(x, torch.tensor([1 - quantile, quantile], dtype=x.dtype), dim=0)
    return x.clamp(low, high).mean(0)


def clipped_mean(rows: Float[Tensor, "prompt d_model"], quantile: float = 0.995) -> Float[Tensor, " d_model"]:
    """Mean over prompts after |x| of each prompt is cut at its own quantile over the coordinates.

    What popular abliteration tools call winsorising: it holds down coordinates that are large in every prompt, and
    depends on the basis.
    """
    check_quantile(quantile)
    x = rows.double()
    limit = rearrange(torch.quantile(x.abs(), quantile, dim=1), "prompt -> prompt 1")
    return x.clamp(-limit, limit).mean(0)


def check_quantile(quantile: float) -> None:
    """Refuse what is no upper quantile.

    Raises:
        UserError: not 0.5 < q <= 1.
    """
    if not 0.5 < quantile <= 1:
        raise UserError(f"a quantile to clamp at must be above 0.5 and at most 1, not {quantile}")


def median_difference(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"]
) -> Float[Tensor, " d_model"]:
    """Geometric median of harmful − of harmless."""
    return geometric_median(harmful) - geometric_median(harmless)


def winsorised_difference(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, quantile: float = 0.95
) -> Float[Tensor, " d_model"]:
    """`winsorised_mean` of harmful − of harmless."""
    return winsorised_mean(harmful, quantile) - winsorised_mean(harmless, quantile)


def clipped_difference(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, quantile: float = 0.995
) -> Float[Tensor, " d_model"]:
    """`clipped_mean` of harmful − of harmless."""
    return clipped_mean(harmful, quantile) - clipped_mean(harmless, quantile)


def projected_difference(
    harmful: Float[Tensor, " d_model"], harmless: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """r − (r·m̂) m̂ with r = harmful − harmless and m the harmless mean: what adding it leaves of the mean is all of it.

    "Projected abliteration" (grimjim); all that it sees are the two means.
    """
    difference = harmful.double() - harmless.double()
    square = harmless.double().square().sum()
    if square == 0:
        return difference
    return difference - (difference @ harmless.double() / square) * harmless.double()
