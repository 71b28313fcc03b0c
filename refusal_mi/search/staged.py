"""The staged search: screen every candidate on few prompts, measure exactly only what can win.

Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016) on the published scores themselves, with the
published thresholds: nothing is estimated from another quantity, only from fewer prompts.
"""

import math
import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, zip_longest

from jaxtyping import Bool, Float
from torch import Tensor

from ..directions import DirectionGrid
from ..engine.jobs import Engine
from ..errors import UserError
from ..measures import RefusalTokens
from ..model.points import HookedModel
from ..options import KLFormula
from ..progress import track
from ..text.chat import ChatFormat
from ..text.given import Prompts
from .grid import ScoreGrid
from .sweep import Kind, Place, Scorer, ScoreTable, WorkItem
from .thresholds import Thresholds

BYPASS, INDUCE, KL = range(3)
MOST = 2
"""A search that has found nothing stops when it has cost so many times what it usually does."""
GROUPS = 3
"""Contenders are looked for among the best, so many times as many as there may be."""
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
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: RefusalTokens,
    *,
    thresholds: Thresholds = PUBLISHED,
    zero_point: float | None = None,
    n_best: int = 1,
    screening: Screening = DEFAULT_SCREENING,
    kl_formula: KLFormula = "exact",
    batch_size: int | None = None,
    engine: Engine | None = None,
) -> ScoreGrid:
    """Find the candidate that `select` would choose after `sweep`, or one close to it, for a fraction of the work.

    1. Candidates of pruned layers are not run.
    2. Bypass, which ranks them, is measured for all others on a few harmful prompts.
    3. Of the best quarter or so, KL and induce on a few harmless prompts; those that clearly break a threshold are
       dropped, until there are enough contenders or the next candidates are clearly worse than the best of them.
    4. Bypass of the contenders, those that break none so far, on twice as many prompts; the better half goes on, and
       whoever is not clearly worse than the best (in the mean difference, prompt by prompt), until all are used.
    5. KL and induce of the last one on twice as many prompts each time, until it clearly breaks a threshold or all its
       scores are known on all prompts. If it breaks one, the next contender; then the next ones.
    6. The others in the same way, the most promising first (how much they bypass, times the chance that they pass):
       until one passes, or while those that were in doubt could be better than the one that did. This ends where the
       search has cost twice what it usually does; the last scores of a candidate that passes are measured all the same.

    Prompts are used in an order that begins with the whole range of the plain model's scores (`spread`).

    Examples:
        >>> found = staged_sweep(model, chat, grid, harmful, harmless, [5, 7])
        >>> len(found.rows) == len(grid.candidates())
        True

    Args:
        zero_point: as in `sweep`, and so is `kl_formula`.
        n_best: survivors to find before the search ends; one is the choice, more can be ablated together.
        engine: as in `sweep`; what is decided together runs at once.

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
        n_best=n_best,
        screening=screening,
        kl_formula=kl_formula,
        batch_size=batch_size,
        engine=engine,
    )[0]


def staged_token_sets(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Prompts,
    harmless: Prompts,
    token_sets: Sequence[RefusalTokens],
    *,
    thresholds: Thresholds = PUBLISHED,
    zero_point: float | None = None,
    n_best: int = 1,
    screening: Screening = DEFAULT_SCREENING,
    kl_formula: KLFormula = "exact",
    batch_size: int | None = None,
    engine: Engine | None = None,
) -> list[ScoreGrid]:
    """`staged_sweep` with a grid for each of several token sets; the first decides what is measured."""
    scorer = Scorer(model, chat, grid, harmful, harmless, token_sets, kl_formula=kl_formula, batch_size=batch_size)
    table = ScoreTable(scorer)
    Rounds(table, thresholds, screening, zero_point, n_best, engine).run()
    first, *others = table.grids()
    return [replace(first, zero_point=zero_point), *others]


def usual_cost(
    candidates: Sequence[Place], n_layers: int, n_harmful: int, n_harmless: int, screening: Screening, n_best: int = 1
) -> float:
    """The work of a search whose first contenders pass and whose first finalists win, in runs of one prompt."""
    if not candidates:
        return 0.0
    n, few = (min(screening.n_prompts, size) for size in (n_harmful, n_harmless))
    n_alive = min(screening.n_contenders, len(candidates))
    both = 2 - sum(layer for _, layer in candidates) / len(candidates) / n_layers  # ablated, and added
    cost = n * len(candidates) + few * n_alive * both
    while n < n_harmful and n_alive > 1:
        n, n_more = min(2 * n, n_harmful), min(n, n_harmful - n)
        cost, n_alive = cost + n_more * n_alive, math.ceil(n_alive / 2)
    return cost + n_best * ((n_harmful - n) + (n_harmless - few) * both)


def spread(ranked: Sequence[int], draw: random.Random) -> list[int]:
    """An order any beginning of which takes from all ranks alike: one of each half, of each quarter, of each eighth.

    Few prompts stand for all of them the better, the more of what differs between prompts their ranks (by the plain
    model's score) know; a plain random draw of four can miss every prompt that an addition could make a refusal.
    """
    if len(ranked) < 2:
        return list(ranked)
    middle = len(ranked) // 2
    halves = [spread(ranked[:middle], draw), spread(ranked[middle:], draw)]
    draw.shuffle(halves)
    return [prompt for pair in zip_longest(*halves) for prompt in pair if prompt is not None]


class Rounds:
    """The rounds of a staged search, on the scores that a table knows or can run."""

    def __init__(
        self,
        table: ScoreTable,
        thresholds: Thresholds,
        screening: Screening,
        zero_point: float | None = None,
        n_best: int = 1,
        engine: Engine | None = None,
    ) -> None:
        self.table, self.thresholds, self.screening, self.engine = table, thresholds, screening, engine
        self.zero_point, self.n_best = zero_point, n_best
        table.skip_layers(thresholds.prune_layers)
        draw, n_harmful, n_prompts = random.Random(screening.seed), table.scorer.n_harmful, table.scorer.n_prompts
        by_score = sorted(range(n_prompts), key=table.scorer.baseline[0].tolist().__getitem__)
        self.harmful = spread([prompt for prompt in by_score if prompt < n_harmful], draw)
        self.harmless = spread([prompt for prompt in by_score if prompt >= n_harmful], draw)
        sizes = table.n_layers, len(self.harmful), len(self.harmless)
        self.usual = usual_cost(table.open, *sizes, screening, n_best)
        self.spent, self.limit = 0.0, math.inf
        self.worst, self.has_stopped = 0.0, False
        self.failed: dict[Place, str] = {}
        """Which threshold a candidate breaks, clearly or on all prompts."""
        self.winners: list[Place] = []
        self.doubtful: list[Place] = []
        """Those that seem to break a threshold, but not clearly."""
        self.rest: list[Place] = []
        """Those of which only bypass is known."""

    def run(self) -> None:
        """Measure until enough candidates pass every threshold exactly, none is left or too much is spent; say why."""
        runs, n_usual = self.prompts_run(), round(self.usual)
        for half, what in enumerate(("scoring candidates", "scoring more candidates"), start=1):
            some = self.until(half * self.usual, runs)  # one bar for each half of what it costs at most
            deque(track(some, what, total=n_usual, work=lambda n: n), maxlen=0)
        deque(runs, maxlen=0)
        for place in self.table.open:
            if not self.table.is_exact(place):
                self.table.reasons[place] = self.reason(place)

    def until(self, most: float, runs: Iterator[int]) -> Iterator[int]:
        """As many of the runs as reach this cost."""
        for n in runs:
            yield n
            if self.spent >= most:
                return

    def prompts_run(self) -> Iterator[int]:
        """Run the items as long as the limit allows; how many prompts each ran through the whole model."""
        for batch in self.batches():
            totals = list(accumulate((item.cost(self.table.n_layers) for item in batch), initial=self.spent))
            n = sum(total <= self.limit for total in totals[1:])
            for item in self.table.done(batch[:n], self.engine):
                before, self.spent = self.spent, self.spent + item.cost(self.table.n_layers)
                yield int(self.spent) - int(before)
            self.spent = totals[n]  # whatever the order in which they were done
            if n < len(batch):
                self.has_stopped = True
                return

    def batches(self) -> Iterator[list[WorkItem]]:
        """The work: items that need nothing of each other, each batch decided on what those before it gave."""
        ranking, few = self.table.open, self.screening.n_prompts
        n_contenders, n_screened = self.screening.n_contenders, 0
        yield from self.measure("ablate", ranking, self.harmful[:few])
        ranking.sort(key=self.bypass)
        self.worst = max((each for each in map(self.bypass, ranking) if math.isfinite(each)), default=0.0)
        contenders: list[Place] = []
        while n_screened < len(ranking) and len(contenders) < n_contenders:
            some = ranking[n_screened : n_screened + n_contenders]
            if n_screened >= GROUPS * n_contenders or (contenders and self.is_worse(some[0], contenders[0])):
                break
            n_screened += len(some)
            for kind in ("add", "ablate"):
                yield from self.measure(kind, some, self.harmless[:few])
                some = [place for place in some if not self.is_out(place)]
            contenders += [place for place in some if self.excess(place)[0] <= 0]
            self.doubtful += [place for place in some if self.excess(place)[0] > 0]
        self.rest = ranking[n_screened:]
        for place in (yield from self.halved(contenders)):
            while (passes := (yield from self.advance(place))) is None:
                pass
            self.winners += [place] if passes else []
            if len(self.winners) == self.n_best:
                break
        self.limit = MOST * self.usual
        yield from self.settle()

    def settle(self) -> Iterator[list[WorkItem]]:
        """Go on with the doubtful ones while they could be among the best, and with the rest while too few pass."""
        while True:
            if len(self.winners) >= self.n_best:
                bar = sorted(map(self.bypass, self.winners))[self.n_best - 1]
                self.rest, self.doubtful = [], [place for place in self.doubtful if self.bypass(place) < bar]
            if not self.doubtful and not self.rest:
                return
            place = max([*self.doubtful, *self.rest], key=self.promise)
            passes = yield from self.advance(place)
            self.winners += [place] if passes else []
            self.rest = [each for each in self.rest if each != place]
            others = [each for each in self.doubtful if each != place]
            self.doubtful = others if passes is not None else [*others, place]

    def promise(self, place: Place) -> float:
        """By how much a candidate bypasses more than the worst, times the chance that it passes, as far as is known."""
        chance = math.erfc(self.excess(place)[0] / math.sqrt(2)) / 2
        return max(self.worst - self.bypass(place), 0.0) * chance

    def halved(self, contenders: list[Place]) -> Generator[list[WorkItem], None, list[Place]]:
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

    def advance(self, place: Place) -> Generator[list[WorkItem], None, bool | None]:
        """Measure KL and induce on twice as many prompts; whether the thresholds are satisfied, once that is known."""
        n = max(2 * len(self.table.known(place, INDUCE)), self.screening.n_prompts)
        likelier: tuple[Kind, Kind] = ("ablate", "add") if self.excess(place)[1] == "KL" else ("add", "ablate")
        for kind in likelier:
            yield from self.measure(kind, [place], self.harmless[:n])
            if self.is_out(place):
                return False
        if n < len(self.harmless):
            return None
        limit, self.limit = self.limit, math.inf  # it passes: the last of its scores are worth what they cost
        yield from self.measure("ablate", [place], self.harmful)
        self.limit = limit
        return self.table.row(place).is_finite

    def measure(self, kind: Kind, places: Sequence[Place], prompts: Sequence[int]) -> Iterator[list[WorkItem]]:
        """What is not known yet, at once."""
        todo: dict[tuple[int, ...], list[Place]] = {}
        for place in places:
            todo.setdefault(tuple(self.table.unknown(kind, place, prompts)), []).append(place)
        items = (self.table.scorer.cut(kind, some, missing, STEP_ROWS) for missing, some in todo.items() if missing)
        yield list(chain.from_iterable(items))

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
        """Whether a threshold is broken by more than the error of so few prompts; of all, at all."""
        excess, name = self.excess(place)
        if excess > self.screening.n_errors:
            self.failed[place] = name
        return place in self.failed

    def excess(self, place: Place) -> tuple[float, str]:
        """By how many standard errors KL or induce break their threshold, and which of them by more."""
        kl, induce = (self.table.known(place, measure) for measure in (KL, INDUCE))
        if not bool(kl.isfinite().all() and induce.isfinite().all()):
            return math.inf, "scores that are not finite"
        floor, most = self.thresholds.induce_floor(self.zero_point), self.thresholds.kl_max
        over = -math.inf if most is None else self.errors_above(kl - most, KL)
        if self.zero_point is None or math.isinf(floor):
            return max((over, "KL"), (self.errors_above(floor - induce, INDUCE), "induce"))
        return max((over, "KL"), (self.errors_below_half(induce >= floor), "induce"))

    def errors_above(self, values: Float[Tensor, " known"], measure: int) -> float:
        """By how many standard errors the mean of values is above 0; all that there are leave no error."""
        if len(values) == self.table.sizes[measure]:
            return math.inf if values.mean() > 0 else -math.inf
        if len(values) < 2:
            return 0.0
        mean, error = values.mean().item(), (values.std() / math.sqrt(len(values))).item()
        return mean / error if error > 0 else math.copysign(math.inf, mean)

    def errors_below_half(self, reach: Bool[Tensor, " known"]) -> float:
        """By how many standard errors fewer than half of the prompts reach what half must; of all, whether they do."""
        n, n_reached = len(reach), int(reach.sum())
        if n == self.table.sizes[INDUCE]:
            return math.inf if 2 * n_reached < n else -math.inf
        return (n / 2 - n_reached) / (math.sqrt(n) / 2) if n else 0.0

    def interval(self, values: Float[Tensor, " prompt"]) -> tuple[float, float]:
        """Mean ± n_errors standard errors; a single prompt says nothing."""
        if len(values) < 2:
            return -math.inf, math.inf
        error = self.screening.n_errors * (values.std() / math.sqrt(len(values))).item()
        return values.mean().item() - error, values.mean().item() + error

    def reason(self, place: Place) -> str:
        """Why a candidate was left out, before a colon (`Selection.explain` counts these), and what was measured."""
        why = f"screened out for {self.failed.get(place, 'bypass')}"
        is_open = len(self.winners) < self.n_best or place in self.doubtful or place in self.rest
        if self.has_stopped and is_open and place not in self.failed:
            why = f"not settled when the search stopped after {len(self.failed)} candidates failed"
        parts = [
            f"{name} {self.table.known(place, measure).mean().item():.2f} on {len(known)} of {size}"
            for measure, (name, size) in enumerate(zip(("bypass", "induce", "KL"), self.table.sizes, strict=True))
            if len(known := self.table.known(place, measure))
        ]
        return f"{why}: {', '.join(parts)} prompts"
