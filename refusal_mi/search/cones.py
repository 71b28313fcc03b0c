"""Cones chosen by thresholds, as directions are: what each mixture does, which pass, and which cone is the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..directions import Direction
from ..errors import UserError
from ..estimators.cones import Cone
from ..interventions import Add
from ..measures import RefusalTokens, refusal_scores
from ..model.points import HookedModel, write_hooks
from ..progress import track
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import Value
from .grid import median_of
from .removals import RemovalScorer
from .thresholds import PUBLISHED, CandidateScore, Thresholds

N_MIXTURES, SEED = 64, 42
"""Published."""


@dataclass(frozen=True, eq=False, repr=False)
class ScoredCone(Value):
    """What each direction of a cone does by itself, and each of some mixtures.

    Examples:
        >>> found = score_cone(model, chat, Cone((direction,)), harmful, harmless, [5, 7], n_mixtures=2)
        >>> found.mean_bypass == pytest.approx(found.of_directions[0].bypass)
        True
    """

    cone: Cone
    mixtures: tuple[Direction, ...]
    of_directions: tuple[CandidateScore, ...]
    of_mixtures: tuple[CandidateScore, ...]
    """In the order of `mixtures`."""
    n_layers: int

    @property
    def mean_bypass(self) -> float:
        """Over the mixtures (nats); the published choice minimises it."""
        return sum(math.inf if row.bypass is None else row.bypass for row in self.of_mixtures) / len(self.of_mixtures)

    def passing(self, thresholds: Thresholds = PUBLISHED, zero_point: float | None = None) -> tuple[Direction, ...]:
        """The mixtures that a search for directions would keep, the lowest refusal score under ablation first."""
        pairs = zip(self.of_mixtures, self.mixtures, strict=True)
        kept = [pair for pair in pairs if not thresholds.reasons(pair[0], self.n_layers, zero_point)]
        return tuple(direction for _, direction in sorted(kept, key=lambda pair: pair[0].bypass or 0.0))

    def fails(self, thresholds: Thresholds = PUBLISHED, zero_point: float | None = None) -> tuple[str, ...]:
        """The rules that the cone breaks: KL of a mixture, induced refusals of a direction of its basis, no score.

        Its layer is none of them: all cones of a model are of the layer of the direction that they began with.
        """
        kinds = {"kl": self.of_mixtures, "induce": self.of_directions}
        kinds |= {"no score": (*self.of_mixtures, *self.of_directions)}
        return tuple(
            rule
            for rule, rows in kinds.items()
            if any(rule in thresholds.reasons(row, self.n_layers, zero_point) for row in rows)
        )


def score_cone(
    model: HookedModel,
    chat: ChatFormat,
    cone: Cone,
    harmful: Prompts,
    harmless: Prompts,
    tokens: RefusalTokens,
    *,
    n_mixtures: int = N_MIXTURES,
    seed: int = SEED,
    batch_size: int | None = None,
) -> ScoredCone:
    """Refusal scores and first-token KL of every direction and mixture, on validation prompts, without generating.

    Every one is ablated at all writes, and added once at its layer, as a search does with candidates.

    Examples:
        >>> found = score_cone(model, chat, Cone((direction,)), harmful, harmless, [5, 7], n_mixtures=2)
        >>> len(found.of_directions), len(found.of_mixtures)
        (1, 2)

    Args:
        n_mixtures: drawn by `Cone.sample`.
        batch_size: most rows in a pass.

    Raises:
        UserError: there are no prompts, or fewer than one mixture is asked for.
    """
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    if n_mixtures < 1:
        raise UserError(f"a cone is scored by at least one mixture, not {n_mixtures}")
    scorer = RemovalScorer(model, chat, harmful, harmless, tokens, batch_size=batch_size)
    drawn = cone.sample(n_mixtures, seed=seed)
    each = [*cone.directions, *drawn]
    whole = [dict.fromkeys(write_hooks(model.cfg.n_layers), 1.0)] * len(each)
    bypass = scorer.score(each, whole, range(scorer.n_harmful)).mean(-1).tolist()
    kl = scorer.kl(each, whole, range(scorer.n_harmless)).mean(-1).tolist()
    rows = []
    for direction, *ablated in zip(track(each, "mixtures of the cone, added"), bypass, kl, strict=True):
        added = refusal_scores(model, chat, harmless, tokens, interventions=Add(direction), batch_size=batch_size or 32)
        position = -1 if direction.position is None else direction.position
        scores = ablated[0], added.mean().item(), ablated[1]
        rows.append(CandidateScore(position, direction.layer, *scores, median_induce=median_of(added)))
    n = len(cone.directions)
    return ScoredCone(cone, tuple(drawn), tuple(rows[:n]), tuple(rows[n:]), model.cfg.n_layers)


def select_cone(
    scored: Sequence[ScoredCone], thresholds: Thresholds = PUBLISHED, zero_point: float | None = None
) -> ScoredCone:
    """The published choice: no mixture's KL above the limit, every direction induces refusals; then the least bypass.

    Examples:
        >>> found = score_cone(model, chat, Cone((direction,)), harmful, harmless, [5, 7], n_mixtures=1)
        >>> select_cone([found], Thresholds(kl_max=None, induce_min=None)) == found
        True

    Args:
        scored: cones of any dimensions and places, measured on the same prompts.
        zero_point: as in `Thresholds.reasons`.

    Raises:
        UserError: none passes.
    """
    kept = [each for each in scored if not each.fails(thresholds, zero_point)]
    if not kept:
        broken = sorted({rule for each in scored for rule in each.fails(thresholds, zero_point)})
        raise UserError(f"no cone passes: all {len(scored)} fail by {', '.join(broken) or 'nothing'}")
    return min(kept, key=lambda each: each.mean_bypass)
