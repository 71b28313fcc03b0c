"""Of two versions of a tensor that writes: along which directions does the second write less, and how much less?

With one written vector a row, R before and R + D after, a removal is D = −R QᵀS Q: what was written along a few
directions Q shrinks in proportion to itself. The two sides of such a change are tied to each other, which training,
rounding and other low-rank changes know nothing of: of those, D u and R u are all but uncorrelated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..values import Value
from ..weights import pieces

Frame = Literal["plain", "gain", "coordinate norms", "input norms"]
"""In which rows a removal is looked for: as they are stored; as the gain of the norm that follows passes them on;
coordinates of the stream divided by their norm over inputs; inputs scaled back by what keeping their norm did."""
MIN_FIT, MIN_STRENGTH, MIN_CONTRAST = 0.9, 0.05, 0.5
"""Of a removed direction: the share of ‖D u‖² that −s R u explains; s; and how much of s is not what everything else
that is written shrank by as well. docs/audit.md has what checkpoints reach from which nothing was removed."""
MIN_PROMINENCE, MIN_SHARE = 8.0, 0.1
"""The least share of ‖D‖² along it, in units of an even share (1 / d_model), and what is enough at any width: noise has
no direction above 4 even shares, and rounding to zero shrinks what is small anyway."""
WELL_EXPLAINED, MUST_HALVE = 0.99, 0.5
"""Share of ‖D‖² above which no other frame is tried; another one has to halve what is not explained."""
N_LEADING, _N_MORE, _N_PASSES = 8, 8, 3


@dataclass(frozen=True, eq=False, repr=False)
class WriterPair(Value):
    """A tensor that writes, in both checkpoints."""

    base: Float[Tensor, "..."]
    suspect: Float[Tensor, "..."]
    axis: int
    """Along which it writes."""
    gain: Float[Tensor, " d_model"] | None = None
    """Of the norm between it and the stream, as it multiplies."""
    suspect_gain: Float[Tensor, " d_model"] | None = None

    @property
    def d_model(self) -> int:
        return self.base.shape[self.axis]

    def rows(
        self, frame: Frame = "plain"
    ) -> Iterator[tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]]:
        """Both versions of what is written for some inputs, and again for the next, in float32 or wider."""
        scale, both = self._scales(frame)
        for one, other in zip(pieces(self.base, self.axis), pieces(self.suspect, self.axis), strict=True):
            wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
            before, after = one.to(wide), other.to(wide)
            if scale is not None and both is not None:
                before, after = before * scale.to(wide), after * both.to(wide)
            if frame == "input norms":
                size = after.square().sum(-1, keepdim=True)
                after = after * torch.where(size > 0, (before * after).sum(-1, keepdim=True) / size, 1)
            yield before, after

    def _scales(self, frame: Frame) -> tuple[Tensor | None, Tensor | None]:
        """What the coordinates of both are multiplied by."""
        if frame == "gain":
            return self.gain, self.suspect_gain
        if frame != "coordinate norms":
            return None, None
        squares = torch.zeros(self.d_model, dtype=torch.float64)
        for before, _ in self.rows():
            squares += before.double().square().sum(0)
        inverse = torch.where(squares > 0, squares.rsqrt(), torch.zeros_like(squares))
        return inverse, inverse


@dataclass(frozen=True, eq=False, repr=False)
class Removal(Value):
    """What of a tensor's change is a removal; no rows where none of it is."""

    directions: Float[Tensor, "removed d_model"]
    """float64, orthonormal, those that explain most first."""
    strengths: tuple[float, ...]
    """1 is removed whole."""
    explained: float
    """Share of ‖D‖² that shrinking along these directions explains."""
    fit: float
    """The largest `Along.fit` of any leading direction that is apart, removed or not."""
    shares: tuple[float, ...]
    """Of ‖D‖² in its leading singular directions."""
    frame: Frame


@dataclass(frozen=True)
class Along:
    """What both versions write along the span of some directions."""

    strength: float
    """s of the best fit D Q ≈ −s R Q; 0 where the base writes nothing there."""
    fit: float
    """The share of ‖D Q‖² that it explains."""
    left: float
    """‖R′Q‖ / ‖R Q‖; 1 where the base writes nothing there."""
    share: float
    """‖D Q‖² / ‖D‖²."""
    elsewhere: float
    """s of all that is not written along them."""

    @property
    def is_apart(self) -> bool:
        """Whether what is written there shrank, and more than what is written elsewhere."""
        is_more = self.strength - self.elsewhere >= MIN_CONTRAST * self.strength
        return self.strength >= MIN_STRENGTH and is_more

    @property
    def is_removal(self) -> bool:
        """Whether it also shrank in proportion to itself."""
        return self.is_apart and self.fit >= MIN_FIT


def find_removal(pair: WriterPair, *, seed: int = 0) -> Removal:
    """The directions that were removed from what a tensor writes, in the frame in which they explain most.

    D's leading directions come from a randomized subspace iteration; inside their span D ≈ −R M is solved for M, and
    the eigenvectors of its symmetric part are the candidates, so that another change of like size does not turn them.
    """
    frames = [frame for frame in get_args(Frame) if frame != "gain" or pair.gain is not None]
    best: Removal | None = None
    for frame in frames:
        found = _in_frame(pair, frame, seed)
        if best is None or 1 - found.explained < MUST_HALVE * (1 - best.explained):
            best = found
        if best.explained >= WELL_EXPLAINED:
            break
    assert best is not None
    return best


def _in_frame(pair: WriterPair, frame: Frame, seed: int) -> Removal:
    width = min(N_LEADING + _N_MORE, pair.d_model)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(pair.d_model, width, generator=generator, dtype=torch.float64)).Q
    for _ in range(_N_PASSES):
        image = torch.zeros_like(basis)
        for before, after in pair.rows(frame):
            change = after - before
            image += (change.T @ (change @ basis.to(change.dtype))).double()
        if not bool(image.any()):
            return Removal(basis.T[:0], (), 0.0, 0.0, (), frame)
        basis = torch.linalg.qr(image / image.norm()).Q
    sums = sums_along(pair, basis.T, frame)
    squares, turn = torch.linalg.eigh(sums.change)
    n = min(N_LEADING, int((squares > squares.max() * 1e-12).sum()))
    leading = turn.flip(-1)[:, :n]
    within = sums.seen_in(leading)
    solved = -torch.linalg.pinv(within.base, rtol=1e-10, hermitian=True) @ within.both
    _, mix = torch.linalg.eigh((solved + solved.T) / 2)
    along = [within.seen_in(mix[:, [index]]).along() for index in range(n)]
    order = sorted(range(n), key=lambda index: -along[index].fit * along[index].share)
    least = min(MIN_SHARE, MIN_PROMINENCE / pair.d_model)
    kept = [index for index in order if along[index].is_removal and along[index].share >= least]
    return Removal(
        (basis @ leading @ mix[:, kept]).T,
        tuple(along[index].strength for index in kept),
        sum((along[index].fit * along[index].share for index in kept), 0.0),
        max((each.fit for each in along if each.is_apart), default=0.0),
        tuple((squares.flip(0)[:n] / sums.change_total).tolist()),
        frame,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Sums(Value):
    """Inner products of what is written before (R) and of its change (D) along some orthonormal directions Q."""

    base: Float[Tensor, "direction direction"]
    """(R Q)ᵀ(R Q)."""
    both: Float[Tensor, "direction direction"]
    """(R Q)ᵀ(D Q)."""
    change: Float[Tensor, "direction direction"]
    """(D Q)ᵀ(D Q)."""
    base_total: float
    """‖R‖²."""
    both_total: float
    change_total: float

    def seen_in(self, turn: Float[Tensor, "direction chosen"]) -> "Sums":
        """The same along combinations of the directions."""
        base, both, change = (turn.T @ each @ turn for each in (self.base, self.both, self.change))
        return Sums(base, both, change, self.base_total, self.both_total, self.change_total)

    def along(self) -> Along:
        """The span of the directions as one."""
        base, both, change = (each.trace().item() for each in (self.base, self.both, self.change))
        rest = self.base_total - base
        return Along(
            strength=-both / base if base else 0.0,
            fit=both**2 / (base * change) if base and change else 0.0,
            left=(max(0.0, base + 2 * both + change) / base) ** 0.5 if base else 1.0,
            share=change / self.change_total if self.change_total else 0.0,
            elsewhere=-(self.both_total - both) / rest if rest > 1e-12 * self.base_total else 0.0,
        )


def sums_along(pair: WriterPair, directions: Float[Tensor, "direction d_model"], frame: Frame = "plain") -> Sums:
    """What both versions write along orthonormal directions, in one pass."""
    n, basis = len(directions), directions.T
    base, both, change = (torch.zeros(n, n, dtype=torch.float64) for _ in range(3))
    totals = [0.0, 0.0, 0.0]
    for before, after in pair.rows(frame):
        difference = after - before
        seen, moved = (each @ basis.to(each.dtype) for each in (before, difference))
        seen, moved = seen.double(), moved.double()
        base, both, change = base + seen.T @ seen, both + seen.T @ moved, change + moved.T @ moved
        for index, (one, other) in enumerate(((before, before), (before, difference), (difference, difference))):
            totals[index] += torch.sum(one * other, dtype=torch.float64).item()
    return Sums(base, both, change, *totals)
