"""The staged search: screen every candidate on few prompts, measure exactly only what can win.

Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016) on the published scores themselves, with the
published thresholds: nothing is estimated from another quantity, only from fewer prompts.
"""

import math
import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat

from jaxtyping import Float
from torch import Tensor

from ..directions import DirectionGrid
from ..errors import UserError
from ..measures import RefusalTokens
from ..model.points import HookedModel
from ..progress import track
from ..text.chat import ChatFormat
from .grid import ScoreGrid
from .sweep import Kind, Place, Scorer, ScoreTable, WorkItem, cut
from .thresholds import Thresholds

BYPASS, INDUCE, KL = range(3)
MOST = 2
"""A search that has found nothing stops when it has cost so many times what it usually does."""
STEP_ROWS = 128
"""Rows (candidates × prompts) that run at once: few enough that a slow model shows progress."""


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
    5. KL and induce of the last one on twice as many prompts each time, until it clearly breaks a threshold or all its
       scores are known on all prompts. If it breaks one, the next contender; then the next ones.
    6. Once the first contenders have all been judged, the search ends where it has cost twice what it usually does.

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
    Rounds(table, thresholds, screening, zero_point).run()
    return [replace(each, zero_point=zero_point) for each in table.grids()]


def usual_cost(
    candidates: Sequence[Place], n_layers: int, n_harmful: int, n_harmless: int, screening: Screening
) -> float:
    """The work of a search whose first contenders pass and whose first finalist wins, in runs of one prompt."""
    if not candidates:
        return 0.0
    n, few = (min(screening.n_prompts, size) for size in (n_harmful, n_harmless))
    n_alive = min(screening.n_contenders, len(candidates))
    both = 2 - sum(layer for _, layer in candidates) / len(candidates) / n_layers  # ablated, and added
    cost = n * len(candidates) + few * n_alive * both
    while n < n_harmful and n_alive > 1:
        n, n_more = min(2 * n, n_harmful), min(n, n_harmful - n)
        cost, n_alive = cost + n_more * n_alive, math.ceil(n_alive / 2)
    return cost + (n_harmful - n) + (n_harmless - few) * both


class Rounds:
    """The rounds of a staged search, on the scores that a table knows or can run."""

    def __init__(
        self, table: ScoreTable, thresholds: Thresholds, screening: Screening, zero_point: float = 0.0
    ) -> None:
        self.zero_point = zero_point
        self.table, self.thresholds, self.screening = table, thresholds, screening
        table.skip_layers(thresholds.prune_layers)
        draw, n_harmful, n_prompts = random.Random(screening.seed), table.scorer.n_harmful, table.scorer.n_prompts
        self.harmful = draw.sample(range(n_harmful), n_harmful)
        self.harmless = draw.sample(range(n_harmful, n_prompts), n_prompts - n_harmful)
        self.usual = usual_cost(table.open, table.n_layers, len(self.harmful), len(self.harmless), screening)
        self.spent, self.limit = 0.0, math.inf
        self.has_stopped = False
        self.failed: dict[Place, str] = {}
        """Which threshold a candidate breaks, clearly or on all prompts."""

    @property
    def induce_floor(self) -> float:
        """What induce must reach."""
        return self.thresholds.induce_floor(self.zero_point)

    def run(self) -> None:
        """Measure until one candidate passes every threshold exactly, none is left or too much is spent; say why."""
        runs, n_usual = self.prompts_run(), round(self.usual)
        for what in ("scoring candidates", "scoring more candidates"):  # one bar for each half of what it costs at most
            deque(track(islice(runs, n_usual), what, total=n_usual), maxlen=0)
        deque(runs, maxlen=0)
        for place in self.table.open:
            if not self.table.is_exact(place):
                self.table.reasons[place] = self.reason(place)

    def prompts_run(self) -> Iterator[None]:
        """Run the items as long as the limit allows; once for each prompt that ran through the whole model."""
        for item in self.items():
            before, after = self.spent, self.spent + item.cost(self.table.n_layers)
            if after > self.limit:
                self.has_stopped = True
                return
            self.table.run(item)
            self.spent = after
            yield from repeat(None, int(after) - int(before))

    def items(self) -> Iterator[WorkItem]:
        """The work, each item decided on what those before it gave."""
        ranking, few, most = self.table.open, self.screening.n_prompts, MOST * self.usual
        yield from self.measure("ablate", ranking, self.harmful[:few])
        ranking.sort(key=self.bypass)
        is_first = True
        while ranking:
            contenders: list[Place] = []
            while ranking and len(contenders) < self.screening.n_contenders:
                if contenders and (self.spent > most or self.is_worse(ranking[0], contenders[0])):
                    break
                some, ranking = ranking[: self.screening.n_contenders], ranking[self.screening.n_contenders :]
                for kind in ("add", "ablate"):
                    yield from self.measure(kind, some, self.harmless[:few])
                    some = [place for place in some if not self.is_out(place)]
                contenders += some
                self.limit = math.inf if is_first and contenders else most
            for place in (yield from self.halved(contenders)):
                if (yield from self.is_survivor(place)):
                    return
            is_first, self.limit = False, most

    def halved(self, contenders: list[Place]) -> Generator[WorkItem, None, list[Place]]:
        """The contenders, those that lasted longest first."""
        alive, lost, n = list(contenders), list[Place](), self.screening.n_prompts
        while n < len(self.harmful) and len(alive) > 1:
            n *= 2
            yield from self.measure("ablate", alive, self.harmful[:n])
            alive.sort(key=self.bypass)
            half, best = math.ceil(len(alive) / 2), alive[0]
            kept = [place for rank, place in enumerate(alive) if rank < half or not self.is_worse(place, best)]
            alive, lost = kept, [place for place in alive if place not in kept] + lost
        return alive + lost

    def is_survivor(self, place: Place) -> Generator[WorkItem, None, bool]:
        """Measure until the candidate breaks a threshold, or everything; whether it satisfies them."""
        n = self.screening.n_prompts
        while n < len(self.harmless):
            n *= 2
            for kind in ("add", "ablate"):
                yield from self.measure(kind, [place], self.harmless[:n])
                if self.is_out(place):
                    return False
        yield from self.measure("ablate", [place], self.harmful)
        return self.table.row(place).is_finite

    def measure(self, kind: Kind, places: Sequence[Place], prompts: Sequence[int]) -> Iterator[WorkItem]:
        """What is not known yet."""
        todo: dict[tuple[int, ...], list[Place]] = {}
        for place in places:
            todo.setdefault(tuple(self.table.unknown(kind, place, prompts)), []).append(place)
        for missing, some in todo.items():
            if missing:
                yield from cut(kind, some, missing, STEP_ROWS)

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
        """Whether KL or induce break their threshold by more than the error of so few prompts; of all, at all."""
        kl, induce = (self.bounds(place, measure) for measure in (KL, INDUCE))
        if self.thresholds.kl_max is not None and kl[0] > self.thresholds.kl_max:
            self.failed[place] = "KL"
        elif induce[1] < self.induce_floor:
            self.failed[place] = "induce"
        return place in self.failed

    def bounds(self, place: Place, measure: int) -> tuple[float, float]:
        """Between what the mean over all prompts lies; where all are known, the mean itself."""
        values = self.table.known(place, measure)
        return (values.mean().item(),) * 2 if len(values) == self.table.sizes[measure] else self.interval(values)

    def interval(self, values: Float[Tensor, " prompt"]) -> tuple[float, float]:
        """Mean ± n_errors standard errors; a single prompt says nothing."""
        if len(values) < 2:
            return -math.inf, math.inf
        error = self.screening.n_errors * (values.std() / math.sqrt(len(values))).item()
        return values.mean().item() - error, values.mean().item() + error

    def reason(self, place: Place) -> str:
        """Why a candidate was left out, before a colon (`Selection.explain` counts these), and what was measured."""
        why = f"screened out for {self.failed.get(place, 'bypass')}"
        if self.has_stopped and place not in self.failed:
            why = f"not settled when the search stopped after {len(self.failed)} candidates failed"
        parts = [
            f"{name} {self.table.known(place, measure).mean().item():.2f} on {len(known)} of {size}"
            for measure, (name, size) in enumerate(zip(("bypass", "induce", "KL"), self.table.sizes, strict=True))
            if len(known := self.table.known(place, measure))
        ]
        return f"{why}: {', '.join(parts)} prompts"
