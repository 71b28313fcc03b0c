"""The staged search: screen every candidate on few prompts, measure exactly only what can win.

Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016) on the published scores themselves, with the
published thresholds: nothing is estimated from another quantity, only from fewer prompts.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from ..directions import DirectionGrid
from ..errors import UserError
from ..measures import RefusalTokens
from ..model.points import HookedModel
from ..text.chat import ChatFormat
from .grid import ScoreGrid
from .sweep import Kind, Place, Scorer, ScoreTable, cut
from .thresholds import Thresholds

BYPASS, INDUCE, KL = range(3)


@dataclass(frozen=True)
class Screening:
    """How much a staged search measures before it measures exactly."""

    n_prompts: int = 4
    """Validation prompts of the first round; doubled in every later one."""
    n_contenders: int = 8
    """Candidates that pass the first round; at most halved in every later one."""
    n_errors: float = 3.0
    """Standard errors by which a candidate must break a threshold, or be worse than the best, to be dropped for it."""
    seed: int = 0
    """Of the order in which prompts are used."""

    def __post_init__(self) -> None:
        if self.n_prompts < 1 or self.n_contenders < 1 or self.n_errors < 0:
            raise UserError("a screening needs at least one prompt and one contender, and n_errors >= 0")


PUBLISHED, DEFAULT_SCREENING = Thresholds(), Screening()


def staged_sweep(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_tokens: RefusalTokens,
    *,
    thresholds: Thresholds = PUBLISHED,
    zero_point: float = 0.0,
    screening: Screening = DEFAULT_SCREENING,
    batch_size: int | None = None,
) -> ScoreGrid:
    """Find the candidate that `select` would choose after `sweep`, or one close to it, for a fraction of the work.

    1. Candidates of pruned layers are not run.
    2. Bypass, which ranks them, is measured for all others on a few harmful prompts.
    3. From the best on, KL and induce on a few harmless prompts; those that clearly break a threshold are dropped,
       until there are enough contenders or the next candidates are clearly worse than the best of them.
    4. Bypass of the contenders on twice as many prompts; the better half goes on, and whoever is not clearly worse
       than the best (in the mean difference, prompt by prompt), until all prompts are used.
    5. All scores of the last one on all prompts. If it breaks a threshold, the next contender; then the next ones.

    Returns:
        Exact scores for the candidates that were measured on all prompts, the choice among them; none for the
        others, each with the reason in `skipped`.
    """
    return staged_token_sets(
        model,
        chat,
        grid,
        harmful,
        harmless,
        [refusal_tokens],
        thresholds=thresholds,
        zero_point=zero_point,
        screening=screening,
        batch_size=batch_size,
    )[0]


def staged_token_sets(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Sequence[str],
    harmless: Sequence[str],
    token_sets: Sequence[RefusalTokens],
    *,
    thresholds: Thresholds = PUBLISHED,
    zero_point: float = 0.0,
    screening: Screening = DEFAULT_SCREENING,
    batch_size: int | None = None,
) -> list[ScoreGrid]:
    """`staged_sweep` with a grid for each of several token sets; the first decides what is measured."""
    scorer = Scorer(model, chat, grid, harmful, harmless, token_sets, batch_size=batch_size)
    table = ScoreTable(scorer)
    table.skip_layers(thresholds.prune_layers)
    Rounds(table, thresholds, screening, zero_point).run()
    return [replace(each, zero_point=zero_point) for each in table.grids()]


class Rounds:
    """The rounds of a staged search, on the scores that a table knows or can run."""

    def __init__(
        self, table: ScoreTable, thresholds: Thresholds, screening: Screening, zero_point: float = 0.0
    ) -> None:
        self.zero_point = zero_point
        self.table, self.thresholds, self.screening = table, thresholds, screening
        draw, n_harmful, n_prompts = random.Random(screening.seed), table.scorer.n_harmful, table.scorer.n_prompts
        self.harmful = draw.sample(range(n_harmful), n_harmful)
        self.harmless = draw.sample(range(n_harmful, n_prompts), n_prompts - n_harmful)

    def run(self) -> None:
        """Measure until one candidate passes every threshold exactly, or none is left; say why for all others."""
        ranking, few = self.table.open, self.screening.n_prompts
        self.measure("ablate", ranking, self.harmful[:few])
        ranking.sort(key=self.bypass)
        has_won = False
        while ranking and not has_won:
            contenders: list[Place] = []
            while ranking and len(contenders) < self.screening.n_contenders:
                if contenders and self.is_worse(ranking[0], contenders[0]):
                    break
                some, ranking = ranking[: self.screening.n_contenders], ranking[self.screening.n_contenders :]
                for kind in ("add", "ablate"):
                    self.measure(kind, some, self.harmless[:few])
                    some = [place for place in some if not self.is_out(place)]
                contenders += some
            has_won = any(self.is_survivor(place) for place in self.halved(contenders))
        for place in self.table.open:
            if not self.table.is_exact(place):
                self.table.reasons[place] = self.reason(place)

    def halved(self, contenders: list[Place]) -> list[Place]:
        """The contenders, those that lasted longest first."""
        alive, lost, n = list(contenders), list[Place](), self.screening.n_prompts
        while n < len(self.harmful) and len(alive) > 1:
            n *= 2
            self.measure("ablate", alive, self.harmful[:n])
            alive.sort(key=self.bypass)
            half, best = math.ceil(len(alive) / 2), alive[0]
            kept = [place for rank, place in enumerate(alive) if rank < half or not self.is_worse(place, best)]
            alive, lost = kept, [place for place in alive if place not in kept] + lost
        return alive + lost

    def is_survivor(self, place: Place) -> bool:
        """Measure everything; whether the candidate satisfies the thresholds."""
        self.measure("ablate", [place], self.harmful + self.harmless)
        self.measure("add", [place], self.harmless)
        return not self.thresholds.reasons(self.table.row(place), self.table.n_layers, self.zero_point)

    def measure(self, kind: Kind, places: Sequence[Place], prompts: Sequence[int]) -> None:
        """Run what is not known yet."""
        todo: dict[tuple[int, ...], list[Place]] = {}
        for place in places:
            todo.setdefault(tuple(self.table.unknown(kind, place, prompts)), []).append(place)
        for missing, some in todo.items():
            for item in cut(kind, some, missing) if missing else ():
                self.table.run(item)

    def bypass(self, place: Place) -> float:
        """Mean over the prompts so far; not finite comes last."""
        mean = self.table.known(place, BYPASS).mean().item()
        return mean if math.isfinite(mean) else math.inf

    def is_worse(self, place: Place, best: Place) -> bool:
        """Whether a candidate's bypass is above the best one's by more than the error of the prompts that both ran."""
        if not math.isfinite(self.bypass(place)):
            return math.isfinite(self.bypass(best))
        low, _ = self.interval(self.table.differences(place, best, BYPASS))
        return low > 0

    def is_out(self, place: Place) -> bool:
        """Whether KL or induce break their threshold by more than the error of so few prompts."""
        kl, induce = (self.interval(self.table.known(place, measure)) for measure in (KL, INDUCE))
        over = self.thresholds.kl_max is not None and kl[0] > self.thresholds.kl_max
        return over or induce[1] < self.thresholds.induce_floor(self.zero_point)

    def interval(self, values: Float[Tensor, " prompt"]) -> tuple[float, float]:
        """Mean ± n_errors standard errors; a single prompt says nothing."""
        if len(values) < 2:
            return -math.inf, math.inf
        error = self.screening.n_errors * (values.std() / math.sqrt(len(values))).item()
        return values.mean().item() - error, values.mean().item() + error

    def reason(self, place: Place) -> str:
        """What was measured of a candidate that was left out."""
        parts = [
            f"{name} {self.table.known(place, measure).mean().item():.2f} on {len(known)} of {size}"
            for measure, (name, size) in enumerate(zip(("bypass", "induce", "KL"), self.table.sizes, strict=True))
            if len(known := self.table.known(place, measure))
        ]
        return f"screened out: {', '.join(parts)} prompts"
