"""The least intervention: which band of blocks and components, how strongly, at the least KL; without generating."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..engine.jobs import Engine
from ..errors import UserError
from ..model.points import Component, write_hooks
from ..values import Value
from .passes import Weights
from .removals import COMPONENTS, Removal, RemovalScorer

MOST_EDGES = 6
"""Into how many parts the blocks are cut for the first bands."""
FIRST_PROMPTS, KEPT = 8, 3
"""Prompts a side of the first round, doubled in each; one in `KEPT` goes on to the next."""
FEWEST = 12
"""Removals that are measured on all prompts before their neighbours are tried."""
N_PARENTS, MOST_CHILDREN = 6, 32
SMOOTHING = 1.06
"""Silverman's: the kernel's width in standard deviations of the scores, for one score."""
STRENGTHS = (0.25, 1.5)
"""The least and the most of a component that is removed."""


def expected_refused(scores: Float[Tensor, "*rest prompt"], zero_point: float) -> Float[Tensor, "*rest"]:
    """The share of prompts to be expected above the zero point, of the scores' density (a Gaussian kernel).

    A count would call many scores just below the zero point the same as many far below, and a search, which takes the
    best of hundreds, would find those that are there by chance.

    Examples:
        >>> expected_refused(torch.tensor([-5.0, 5.0]), 0.0).item()
        0.5
    """
    width = SMOOTHING * scores.std(-1, correction=0, keepdim=True) * scores.shape[-1] ** -0.2
    smooth = torch.special.ndtr((scores - zero_point) / width)
    return torch.where(width > 0, smooth, (scores > zero_point).to(scores.dtype)).mean(-1)


@dataclass(frozen=True, eq=False, repr=False)
class Measured(Value):
    """A removal with the refusal scores of harmful prompts and the KL of harmless ones under it."""

    removal: Removal
    scores: Float[Tensor, " harmful"]
    """Nats, float64."""
    kl: Float[Tensor, " harmless"]
    """Nats per token, float64."""

    def n_refused(self, zero_point: float) -> int:
        """Prompts whose refusal score is above the zero point."""
        return int((self.scores > zero_point).sum())

    def refused(self, zero_point: float) -> float:
        """The share of prompts to be expected above the zero point."""
        return expected_refused(self.scores, zero_point).item()

    @property
    def mean_kl(self) -> float:
        """Over prompts."""
        return self.kl.mean().item()


@dataclass(frozen=True, eq=False, repr=False)
class Localized(Value):
    """What a search measured on all of its prompts."""

    whole: Measured
    """The ablation of all writes with the first direction: what the others are compared with."""
    measured: tuple[Measured, ...]
    """Best first: as few refusals as the whole ablation leaves (`Measured.refused`), then the least KL."""
    zero_point: float
    n_tried: int
    """Removals that were measured on some prompts."""

    @property
    def front(self) -> tuple[Measured, ...]:
        """Those that no other beats in refusals and KL both, by falling refusals."""
        return pareto([self.whole, *self.measured], self.zero_point)


def pareto(measured: Sequence[Measured], zero_point: float) -> tuple[Measured, ...]:
    """Those that none has both fewer refusals and less KL than, the most refusals first; of equal ones the first."""
    front: list[Measured] = []
    for each in sorted(measured, key=lambda one: (one.refused(zero_point), one.mean_kl)):
        if not front or each.mean_kl < front[-1].mean_kl:
            front.append(each)
    return tuple(front[::-1])


def first_removals(directions: Sequence[Direction], n_layers: int) -> list[Removal]:
    """Every band between a few edges, of every choice of components, for every direction.

    Examples:
        >>> all(0 <= each.first < each.last <= 6 for each in first_removals([direction], 6))
        True
    """
    n_parts = min(n_layers, MOST_EDGES)
    edges = sorted({round(part * n_layers / n_parts) for part in range(n_parts + 1)})
    choices: list[tuple[Component, ...]] = [COMPONENTS, ("attn", "mlp"), ("attn",), ("mlp",)]
    return [
        Removal(direction, first, last, components)
        for direction in directions
        for first, last in combinations(edges, 2)
        for components in choices
        if "embed" not in components or first == 0  # elsewhere it would change nothing
    ]


def neighbours(removal: Removal, directions: Sequence[Direction], n_layers: int) -> Iterator[Removal]:
    """A little more or less of everything that a removal is made of."""
    low, high = STRENGTHS
    for first, last in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1)):
        moved = (removal.first + first, removal.last + last)
        if 0 <= moved[0] < moved[1] <= n_layers:
            components = removal.components if moved[0] == 0 else tuple(c for c in removal.components if c != "embed")
            if components:
                yield replace(removal, first=moved[0], last=moved[1], components=components)
    for factor in (0.75, 0.9, 1.1, 1.25):
        if low <= removal.strength * factor <= high:
            yield replace(removal, strength=removal.strength * factor)
    for components in ((*removal.components, "embed"), *_without_one(removal.components)):
        if ("embed" not in components or removal.first == 0) and len(set(components)) == len(components):
            yield replace(removal, components=tuple(part for part in COMPONENTS if part in components))
    if removal.shape == "flat" and removal.last - removal.first > 1:
        yield replace(removal, shape="peak")
    if removal.shape == "peak":
        yield replace(removal, shape="flat", floor=0.0)
        yield replace(removal, floor=removal.strength / 2 if removal.floor == 0 else 0.0)
    for direction in directions:
        if direction is not removal.direction:
            yield replace(removal, direction=direction)


def _without_one(components: Sequence[Component]) -> list[tuple[Component, ...]]:
    return [tuple(part for part in components if part != out) for out in components] if len(components) > 1 else []


def localize_removal(
    scorer: RemovalScorer,
    directions: Sequence[Direction],
    zero_point: float = 0.0,
    *,
    n_generations: int = 4,
    engine: Engine | None = None,
) -> Localized:
    """Search for the removal with the least KL that leaves no more refusals than ablating the first direction whole.

    Successive halving over bands and components, on more prompts each round; then generations of neighbours of the
    best, on all prompts. Nothing is drawn at random: the same model and prompts give the same result.

    Examples:
        >>> scorer = RemovalScorer(model, chat, harmful, harmless, [5, 7])
        >>> found = localize_removal(scorer, [direction], n_generations=1)
        >>> found.whole.removal == Removal(direction, 0, model.cfg.n_layers)
        True

    Args:
        directions: where from; the first is the one that a whole ablation is made of.
        zero_point: refusal score (nats) above which a prompt counts as refused.
        n_generations: at most; fewer where a generation finds nothing better.
        engine: where the removals of a round or a generation are measured; None is here. What is tried next is decided
            here, once all of them are known.

    Raises:
        UserError: there are no directions.
    """
    if not directions:
        raise UserError("localizing needs at least one direction")
    n_layers, measure = scorer.model.cfg.n_layers, partial(_measure, scorer, engine)
    whole = Removal(directions[0], 0, n_layers)
    open_, n_prompts, n_tried = first_removals(directions, n_layers), FIRST_PROMPTS, 0
    n_all = max(scorer.n_harmful, scorer.n_harmless)
    n_tried = len(open_)
    while n_prompts < n_all and len(open_) > FEWEST:
        measured = measure([whole, *open_], n_prompts, f"{len(open_)} removals on {n_prompts} prompts a side")
        best = sorted(measured[1:], key=_order(measured[0], zero_point))
        open_ = [each.removal for each in best[: max(FEWEST, len(open_) // KEPT)]]
        n_prompts *= 2
    found = measure([whole, *open_], n_all, f"{len(open_)} removals on all prompts")
    reference, known = found[0], {_key(each.removal, n_layers): each for each in found}
    order = _order(reference, zero_point)
    for generation in range(1, n_generations + 1):
        best = sorted(known.values(), key=order)[:N_PARENTS]
        children: dict[object, Removal] = {}
        for parent in best:
            for child in neighbours(parent.removal, directions, n_layers):
                if _key(child, n_layers) not in known:
                    children.setdefault(_key(child, n_layers), child)
        some = list(children.values())[:MOST_CHILDREN]
        n_tried += len(some)
        if n_all > 2 * FIRST_PROMPTS and len(some) > FEWEST:
            about = f"generation {generation}: {len(some)} neighbours on {2 * FIRST_PROMPTS} prompts a side"
            first, *measured = measure([whole, *some], 2 * FIRST_PROMPTS, about)
            some = [each.removal for each in sorted(measured, key=_order(first, zero_point))[:FEWEST]]
        for each in measure(some, n_all, f"generation {generation}: {len(some)} neighbours") if some else ():
            known[_key(each.removal, n_layers)] = each
        if sorted(known.values(), key=order)[0] is best[0]:
            break
    rest = [each for each in known.values() if each is not reference]
    return Localized(reference, tuple(sorted(rest, key=order)), zero_point, n_tried)


def map_writes(
    scorer: RemovalScorer, direction: Direction, engine: Engine | None = None
) -> tuple[float, Float[Tensor, " write"], Float[Tensor, " write"]]:
    """The plain model's mean refusal score; the score and KL when one write alone loses the direction.

    All of the same prompts, in the order of `write_hooks`.

    Examples:
        >>> plain, refused, kl = map_writes(RemovalScorer(model, chat, harmful, harmless, [5, 7]), direction)
        >>> len(refused) == len(kl) == 1 + 2 * model.cfg.n_layers
        True
    """
    weights: list[Weights] = [{}, *({name: 1.0} for name in write_hooks(scorer.model.cfg.n_layers))]
    directions, n = [direction] * len(weights), 2 * FIRST_PROMPTS
    scores, kl = scorer.measure(directions, weights, n, about="one write at a time", engine=engine)
    (plain, *means), (_, *kl_means) = scores.mean(-1).tolist(), kl.mean(-1).tolist()
    return plain, torch.tensor(means, dtype=torch.float64), torch.tensor(kl_means, dtype=torch.float64)


def _measure(
    scorer: RemovalScorer, engine: Engine | None, removals: Sequence[Removal], n_prompts: int, about: str
) -> list[Measured]:
    directions = [each.direction for each in removals]
    weights = [each.weights(scorer.model.cfg.n_layers) for each in removals]
    rows = scorer.measure(directions, weights, n_prompts, about=about, engine=engine)
    return [Measured(*each) for each in zip(removals, *rows, strict=True)]


def _order(whole: Measured, zero_point: float) -> Callable[[Measured], tuple[float, float]]:
    """Refusals beyond those that the whole ablation leaves, or half a prompt, then KL."""
    left = max(whole.refused(zero_point), 0.5 / len(whole.scores))
    return lambda each: (max(0.0, each.refused(zero_point) - left), each.mean_kl)


def _key(removal: Removal, n_layers: int) -> object:
    """Removals that change the same writes by the same direction and amounts are one."""
    weights = sorted((name, round(weight, 9)) for name, weight in removal.weights(n_layers).items())
    return id(removal.direction), tuple(weights)
