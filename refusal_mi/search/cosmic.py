"""COSMIC: candidates chosen by where they move activations, without refusal tokens or answers (Siu et al. 2025)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import DirectionGrid
from ..errors import UserError
from ..interventions import Ablate, Add, Intervention
from ..model.points import HookedModel, stream_after
from ..progress import track
from ..reading import template_residuals
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .thresholds import PUBLISHED, layer_limit

CosmicReason = Literal["no score", "layer", "kl", "late at the last position"]
SHARE_OF_LAYERS = 0.1
"""Of the blocks: those whose outputs tell the classes apart most."""
LAST = -1


@dataclass(frozen=True)
class CosmicScore:
    """Two cosines of one candidate, each at most 1 and higher is better; None where it is no direction.

    Examples:
        >>> CosmicScore(-1, 2, comply=0.9, refuse=0.8).total == pytest.approx(1.7)
        True
    """

    position: int
    layer: int
    comply: float | None
    """Harmful prompts with the candidate ablated, against harmless ones as they are."""
    refuse: float | None
    """Harmless prompts with the candidate added, against harmful ones as they are."""
    kl_nats: float | None = None
    """KL(plain ‖ ablated) on harmless prompts, where it was measured."""

    @property
    def total(self) -> float | None:
        """The sum of both, which the choice maximises."""
        return None if self.comply is None or self.refuse is None else self.comply + self.refuse

    def describe(self) -> dict[str, Any]:
        """JSON values, under the published names."""
        return {
            "position": self.position,
            "layer": self.layer,
            "refusal_score": self.comply,
            "steering_score": self.refuse,
            "kl_div_score": self.kl_nats,
        }

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "CosmicScore":
        """What `describe` says."""
        numbers = (row[key] for key in ("refusal_score", "steering_score", "kl_div_score"))
        return cls(
            int(row["position"]), int(row["layer"]), *(None if each is None else float(each) for each in numbers)
        )


@dataclass(frozen=True)
class CosmicSelection:
    """The survivors, best first, and why the others are none."""

    survivors: tuple[CosmicScore, ...]
    rejected: tuple[tuple[CosmicScore, tuple[CosmicReason, ...]], ...]

    @property
    def best(self) -> CosmicScore:
        """The candidate of the largest sum.

        Raises:
            UserError: none survives.
        """
        if not self.survivors:
            broken = sorted({reason for _, reasons in self.rejected for reason in reasons})
            raise UserError(f"no candidate survives: all {len(self.rejected)} fail by {', '.join(broken) or 'nothing'}")
        return self.survivors[0]

    def explain(self) -> str:
        """How many candidates survive and what the others fail, in one sentence."""
        failed = Counter(reason for _, reasons in self.rejected for reason in reasons)
        parts = ", ".join(f"{failed[reason]} fail by {reason}" for reason in get_args(CosmicReason) if failed[reason])
        total = len(self.survivors) + len(self.rejected)
        return f"{len(self.survivors)} of {total} candidates survive" + (f"; {parts}" if parts else "")


def evaluation_layers(
    harmful: Float[Tensor, "layer d_model"], harmless: Float[Tensor, "layer d_model"], share: float = SHARE_OF_LAYERS
) -> tuple[int, ...]:
    """The layers of lowest cosine between the class means: int(share · n) of n, and at least one.

    Examples:
        >>> evaluation_layers(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        (2,)

    Args:
        harmful: mean output of every block at the last position, row b of block b.

    Returns:
        Our layers, the streams *after* the chosen blocks, in order. The published code takes none where share · n < 1.
    """
    cosines = torch.nn.functional.cosine_similarity(harmful.double(), harmless.double(), dim=-1)
    blocks = cosines.argsort(stable=True)[: max(1, int(share * len(cosines)))]
    return tuple(sorted(stream_after(block) for block in blocks.tolist()))


def cosmic_cosines(
    harmful: Float[Tensor, "a layer d_model"],
    harmless: Float[Tensor, "b layer d_model"],
    ablated_harmful: Float[Tensor, "a layer d_model"],
    added_harmless: Float[Tensor, "b layer d_model"],
) -> tuple[float, float]:
    """S_comply and S_refuse of one candidate, from activations at the last position of the evaluation layers.

    Every table is averaged over prompts and layers; then cos(ablated harmful, harmless), cos(added harmless, harmful).

    Examples:
        >>> one, another = torch.eye(2)[:1, None], torch.eye(2)[1:, None]
        >>> cosmic_cosines(one, another, another, one), cosmic_cosines(one, another, one, another)
        ((1.0, 1.0), (0.0, 0.0))
    """
    means = [table.double().mean((0, 1)) for table in (harmful, harmless, ablated_harmful, added_harmless)]
    means = [mean / mean.norm() for mean in means]
    return (means[2] @ means[1]).item(), (means[3] @ means[0]).item()


def select_cosmic(
    scores: Sequence[CosmicScore],
    n_layers: int,
    *,
    kl_max: float | None = PUBLISHED.kl_max,
    prune_layers: float | None = PUBLISHED.prune_layers,
) -> CosmicSelection:
    """The published rule: drop by KL and layer, then rank by the sum of the two cosines; ties keep their order.

    At the last position candidates are dropped whose layer lies beyond the median layer of the best ablation *and* that
    of the best addition, both over the other positions: there activations already tell of the answer. A candidate whose
    KL was not measured fails where `kl_max` asks for it.

    Examples:
        >>> rows = [CosmicScore(-2, 2, 0.9, 0.8, 0.01), CosmicScore(-2, 3, 0.9, 0.9, 0.5)]
        >>> select_cosmic(rows, n_layers=8).best.layer
        2
    """
    late, limit = _late_layer(scores), layer_limit(n_layers, prune_layers)
    survivors, rejected = [], []
    for row in scores:
        reasons: list[CosmicReason] = []
        if row.total is None:
            reasons.append("no score")
        if row.layer >= limit:
            reasons.append("layer")
        if kl_max is not None and row.total is not None and (row.kl_nats is None or row.kl_nats > kl_max):
            reasons.append("kl")
        if row.position == LAST and late is not None and row.layer > late:
            reasons.append("late at the last position")
        if reasons:
            rejected.append((row, tuple(reasons)))
        else:
            survivors.append(row)
    survivors.sort(key=lambda row: -(row.total or 0.0))
    return CosmicSelection(tuple(survivors), tuple(rejected))


def _late_layer(scores: Sequence[CosmicScore]) -> int | None:
    """The later of two median peaks over the positions before the last; None where there are none."""
    by_position: dict[int, list[CosmicScore]] = {}
    for row in scores:
        if row.position != LAST and row.comply is not None and row.refuse is not None:
            by_position.setdefault(row.position, []).append(row)
    if not by_position:
        return None
    rows = by_position.values()
    comply = [max(each, key=lambda row: row.comply or 0.0).layer for each in rows]
    refuse = [max(each, key=lambda row: row.refuse or 0.0).layer for each in rows]
    return max(sorted(peaks)[(len(peaks) - 1) // 2] for peaks in (comply, refuse))  # the lower of two middle ones


def cosmic_scores(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Prompts,
    harmless: Prompts,
    layers: Sequence[int],
    *,
    kl: Mapping[tuple[int, int], float | None] | None = None,
    batch_size: int = 32,
) -> list[CosmicScore]:
    """Both cosines of every candidate on validation prompts, two runs of every prompt a candidate.

    Examples:
        >>> found = cosmic_scores(model, chat, grid, harmful, harmless, [3])
        >>> len(found) == len(grid.candidates())
        True

    Args:
        layers: of `evaluation_layers`, from the training prompts.
        kl: what a sweep measured, by (position, layer).
    """

    def read(instructions: Sequence[str], interventions: Sequence[Intervention] = ()) -> Tensor:
        table = template_residuals(
            model, chat, instructions, layers=layers, n_last=1, interventions=interventions, batch_size=batch_size
        )
        return table[:, 0]

    grid.check_all_layers()
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    plain = read(harmful), read(harmless)
    scores = []
    for row, position in enumerate(track(grid.positions, "scoring candidates (COSMIC)")):
        for layer in range(grid.n_layers):
            known = None if kl is None else kl.get((position, layer))
            if grid.is_degenerate[row][layer]:
                scores.append(CosmicScore(position, layer, None, None, known))
                continue
            direction = grid.direction(position, layer)
            changed = read(harmful, [Ablate(direction)]), read(harmless, [Add(direction)])
            scores.append(CosmicScore(position, layer, *cosmic_cosines(*plain, *changed), known))
    return scores
