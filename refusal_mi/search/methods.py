"""Subspaces of different methods at equal refusal: what each costs where it leaves as many refusals as another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UserError
from ..stats import bootstrap_interval
from ..values import Value
from .passes import Basis

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""Fractions of the component in the subspace that are removed; the plain model is 0."""
TOLERATED = 0.05
"""Of the plain model's refusals, where a whole removal leaves fewer: a few prompts would decide otherwise."""
CLOSE = 0.03
"""Strengths around the one at which the share of refusals falls to a target lie closer than this."""


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Value):
    """What harmful and harmless prompts do at rising strengths; the plain model first.

    Examples:
        >>> curve = Curve((0.0, 1.0), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.1, 0.3]]))
        >>> curve.share(0.0).item(), curve.share(1.0).item()
        (1.0, 0.5)
    """

    strengths: tuple[float, ...]
    refused: Float[Tensor, "strength *rest harmful"]
    """1 where the answer refuses."""
    kl: Float[Tensor, "strength *rest harmless"]
    """Nats per token, float64."""

    def __post_init__(self) -> None:
        n = len(self.strengths)
        if self.strengths[:1] != (0.0,) or list(self.strengths) != sorted(self.strengths):
            raise UserError(f"strengths rise from 0, the plain model, not {self.strengths}")
        if len(self.refused) != n or len(self.kl) != n:
            raise UserError(f"{n} strengths need as many rows, not {len(self.refused)} and {len(self.kl)}")

    def of_first(self, n: int) -> "Curve":
        """Of the first prompts of both sides."""
        return Curve(self.strengths, self.refused[:, :n], self.kl[:, :n])

    def share(self, strength: float) -> Float[Tensor, "*rest"]:
        """Refused answers at one strength."""
        return self.refused[self.strengths.index(strength)].mean(-1)

    @property
    def target(self) -> Float[Tensor, "*rest"]:
        """The share of refusals that counts as stopped: what strength 1 leaves, or `TOLERATED` of the plain ones."""
        return torch.maximum(self.share(1.0), TOLERATED * self.share(0.0))


@dataclass(frozen=True)
class Matched:
    """Where a method leaves as few refusals as the reference, and what that costs."""

    strength: float | None
    """The least; None where no strength is enough, or the plain model refuses no more already."""
    kl_nats: float | None
    ratio: tuple[float | None, float | None, float | None]
    """KL over that of the reference, with its 95% interval (BCa over prompts).

    None where either KL is 0; no limits where drawn prompts leave the ratio without bounds, such as a divisor of 0, or
    BCa cannot be computed.
    """
    refused: float | None = None
    """The share of refusals at which both are compared."""


def match(method: Curve, other: Curve, reference: Curve | None = None, *, n_resamples: int = 1999) -> Matched:
    """The least strength at which a method leaves as few refusals as the reference does at strength 1, and its cost.

    A method that never leaves as few is compared where the other leaves as many as it does itself at strength 1; where
    that is not `TOLERATED` of the plain model's refusals less than all, it has no cost. Between two strengths the share
    of refusals is taken to be linear, and the square root of each prompt's KL: where the share falls, strengths should
    lie close. The interval draws prompts, for all methods the same, and does everything else again. Where the sides
    differ in number, as many of each count as there are of both.

    Examples:
        >>> cheap = Curve((0.0, 1.0), torch.tensor([[1.0] * 8, [0.0] * 8]), torch.tensor([[0.0] * 8, [0.1] * 8]))
        >>> dear = Curve(cheap.strengths, cheap.refused, 2 * cheap.kl)
        >>> [round(end, 6) for end in match(dear, cheap).ratio]
        [2.0, 2.0, 2.0]

    Args:
        other: whose cost, at its own least strength, the ratio is to.
        reference: None is `other`.
        n_resamples: for the interval; 0 leaves it out.
    """
    n = min(each for curve in (method, other) for each in (curve.refused.shape[1], curve.kl.shape[1]))
    curves = [each.of_first(n) for each in (method, other, other if reference is None else reference)]
    target = common_target(*curves)
    strength, kl = _crossing(curves[0], target)
    if not strength.isfinite() or target > (1 - TOLERATED) * curves[0].share(0.0):
        return Matched(None, None, (None, None, None))
    ratio_alone = (kl / _crossing(curves[1], target)[1]).item()
    if not math.isfinite(ratio_alone) or ratio_alone <= 0:
        return Matched(strength.item(), kl.item(), (None, None, None), target.item())
    if not n_resamples:
        return Matched(strength.item(), kl.item(), (ratio_alone, None, None), target.item())
    tables = [table for each in curves for table in (each.refused, each.kl)]
    ends = [0, *accumulate(map(len, tables))]

    def ratio(*drawn: Any) -> Any:
        parts = [torch.stack([torch.as_tensor(row) for row in drawn[a:b]]) for a, b in pairwise(ends)]
        again = [Curve(each.strengths, *parts[2 * i : 2 * i + 2]) for i, each in enumerate(curves)]
        own, others = (_crossing(each, common_target(*again))[1] for each in again[:2])
        return (own / others).numpy()

    samples = [row.tolist() for table in tables for row in table]
    value, low, high = (
        each if each == each else None
        for each in bootstrap_interval(*samples, statistic=ratio, n_resamples=n_resamples)
    )
    return Matched(strength.item(), kl.item(), (value, low, high), target.item())


Triple = tuple[Curve, Curve, Curve]
"""A method, the one that its cost is compared with, and the reference."""


@dataclass(frozen=True)
class OverDraws:
    """A ratio of costs, of a method that was found again from drawn training prompts."""

    ratios: tuple[float | None, ...]
    """Of every draw, all training prompts first; None where there is nothing to compare."""
    one_fit: tuple[float | None, float | None, float | None]
    """The first of them with its 95% interval over held-out and training prompts; no limits with fewer than 3 draws,
    or where a draw has no ratio or drawn prompts leave it unbounded."""
    sd_draws: float | None = None
    """Of the natural log: root mean square distance of the drawn ones from the first."""
    se_prompts: float | None = None
    """Of the natural log: standard error of the first over held-out prompts, by the bootstrap."""


def match_draws(draws: Sequence[Triple | None], *, n_resamples: int = 1999, seed: int = 0) -> OverDraws:
    """The ratio of costs, as `match` has it, of every draw of training prompts, and how far one fit can be trusted.

    The first draw is that of all training prompts; the others are bootstrap samples of these, whose distances from it
    are those of it from what it estimates. The interval is a confidence interval for the method's ratio, from one fit
    and one set of held-out prompts: log ratio ± t(N − 1)·√(se² + sd²), which is rather too wide
    where prompts matter more than draws. It is not one of the mean over draws, which would narrow with their number.

    Args:
        draws: None where a method gave no directions.
    """
    ratios = tuple(None if each is None else match(*each, n_resamples=0).ratio[0] for each in draws)
    values, triples = [each for each in ratios if each], [each for each in draws if each is not None]
    if len(values) < max(2, len(draws)):
        return OverDraws(ratios, (ratios[0] if ratios else None, None, None))
    n = min(table.shape[-1] for curve in triples[0] for table in (curve.refused, curve.kl))
    prompts = torch.randint(n, (n_resamples, n), generator=torch.Generator().manual_seed(seed))
    logs = _drawn_ratio(triples[0], prompts).log()
    first, *others = map(math.log, values)
    sd = math.sqrt(math.fsum((each - first) ** 2 for each in others) / len(others))
    if not logs.isfinite().all():
        return OverDraws(ratios, (values[0], None, None), sd)
    se = logs.std().item()
    if len(draws) < 3:
        return OverDraws(ratios, (values[0], None, None), sd, se)
    if not se + sd:
        return OverDraws(ratios, (values[0], values[0], values[0]), sd, se)
    from scipy.special import stdtrit

    half = float(stdtrit(len(others), 0.975)) * math.hypot(se, sd)
    return OverDraws(ratios, (values[0], math.exp(first - half), math.exp(first + half)), sd, se)


def _drawn_ratio(curves: Triple, prompts: Int[Tensor, "draw prompt"]) -> Float[Tensor, " draw"]:
    """Of every draw of prompts."""
    again = [Curve(each.strengths, each.refused[:, prompts], each.kl[:, prompts]) for each in curves]
    own, others = (_crossing(each, common_target(*again))[1] for each in again[:2])
    return own / others


def common_target(method: Curve, other: Curve, reference: Curve) -> Float[Tensor, "*rest"]:
    """The share of refusals that two methods are compared at.

    The reference's target where both reach it at any strength, else the most that the two leave at strength 1.
    """
    target = reference.target
    both = torch.maximum(*(each.refused.mean(-1).amin(0) for each in (method, other))) <= target
    whole = torch.maximum(target, torch.maximum(method.share(1.0), other.share(1.0)))
    return torch.where(both, target, whole)


def crossing_ends(method: Curve, target: float) -> tuple[float, float] | None:
    """The strengths between which the share of refusals first falls to a target; None where there is no such fall."""
    for (low, high), shares in zip(pairwise(method.strengths), pairwise(method.refused.mean(-1).tolist()), strict=True):
        if shares[1] <= target:
            return (low, high) if shares[0] > target else None
    return None


def overlap(one: Basis, other: Basis) -> float:
    """‖Q₁Q₂ᵀ‖² / min(k₁, k₂): 1 where one span holds the other, 0 where they are orthogonal.

    Mean squared cosine of the principal angles; of random spans max(k₁, k₂) / d_model is expected.

    Examples:
        >>> x, y, z = torch.eye(3).split(1)
        >>> overlap(torch.cat([x, y]), x), overlap(torch.cat([x, y]), z)
        (1.0, 0.0)
    """
    return ((one.double() @ other.double().T).square().sum() / min(len(one), len(other))).item()


def _crossing(method: Curve, target: Float[Tensor, "*rest"]) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """The strength at which the share of refusals first falls to the target, and the KL there.

    NaN where it never does, or the plain model refuses no more than that: there is nothing to match. Tables may
    have axes between strengths and prompts.
    """
    shares, roots = method.refused.mean(-1), method.kl.clamp(min=0).sqrt()
    reached = shares <= target
    end = reached.int().argmax(0)[None]
    start = (end - 1).clamp(min=0)
    high, low = (shares.gather(0, each)[0] for each in (start, end))
    part = torch.where(high > low, (high - target) / (high - low), torch.zeros_like(high))
    strengths = torch.tensor(method.strengths, dtype=torch.float64)
    low_strength, high_strength = (strengths[each[0]] for each in (start, end))
    strength = torch.lerp(low_strength, high_strength, part)
    low_root, high_root = (roots.gather(0, each[..., None].expand(1, *roots.shape[1:]))[0] for each in (start, end))
    kl = torch.lerp(low_root, high_root, part[..., None]).square().mean(-1)
    falls, never = reached.any(0) & ~reached[0], torch.full_like(strength, torch.nan)
    return torch.where(falls, strength, never), torch.where(falls, kl, never)
