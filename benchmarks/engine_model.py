"""What many workers would take for a search: a simulation from the item times that `benchmarks.engine` measured.

`python -m benchmarks.engine_model` prints the tables of docs/scaling.md. It assumes that

- items are handed out one by one in their order, each to the worker that is free first; handing one out takes this
  process what an item was measured to take beside its work, and meanwhile it hands out no other;
- a worker takes for an item what one worker alone took for it on a core of its own;
- workers start at once; each needs what one worker needed to start, and the machines, of eight workers each, read the
  weights from one place of `shared_mib` a second, where that takes longer;
- stragglers: one worker in 20 takes three times as long for every item;
- failures: workers end at random, on average after two hours; another one starts, and the item is done again.
"""

import heapq
import math
import random
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.engine import RESULTS, WorkersRecord
from refusal_mi.files import read_record
from refusal_mi.terminal import tell

WORKERS = (1, 2, 8, 64, 512)
TIMES_LARGER = 16
"""Than the measured search is another one of the same items: more candidates, or more prompts."""
N_TRIES = 2
SLOW_SHARE, HOURS = 0.05, 2.0
HEAD = (
    "| workers | warm | with starting | times one worker | of n workers | and stragglers | and failures "
    "| workers lost | items given up |"
)


@dataclass(frozen=True)
class Workers:
    """Workers, and what goes wrong with them."""

    n: int
    start_seconds: float = 0.0
    overhead_seconds: float = 0.0
    weights_mib: float = 0.0
    shared_mib: float = 1000.0
    """Weights that are read a second, by all machines together."""
    a_machine: int = 8
    slow_share: float = 0.0
    slow_factor: float = 3.0
    hours_to_failure: float | None = None
    seed: int = 0

    def reading(self, n: int) -> float:
        """Seconds until so many workers that start together are ready."""
        return max(self.start_seconds, -(-n // self.a_machine) * self.weights_mib / self.shared_mib)


@dataclass
class Outcome:
    """What happened."""

    seconds: float = 0.0
    n_lost: int = 0
    """Workers that ended at work."""
    n_given_up: int = 0
    """Items that two workers ended with: the engine would report them."""


def simulate(item_seconds: Sequence[float], workers: Workers) -> Outcome:
    """All items, handed out in their order to whoever is free; the same seed gives the same outcome."""
    draw, found = random.Random(workers.seed), Outcome()
    factors = [workers.slow_factor if draw.random() < workers.slow_share else 1.0 for _ in range(workers.n)]

    def life() -> float:
        return math.inf if workers.hours_to_failure is None else draw.expovariate(1 / (3600 * workers.hours_to_failure))

    begin = workers.reading(workers.n)
    ends = [begin + life() for _ in factors]
    order, driver, waiting, idle = count(), 0.0, deque(range(len(item_seconds))), deque[int]()
    n_left, n_tried = len(item_seconds), Counter[int]()
    events: list[tuple[float, int, int, int | None, bool]]
    events = [(begin, next(order), worker, None, False) for worker in range(workers.n)]
    while n_left:
        now, _, worker, item, is_lost = heapq.heappop(events)
        if item is not None and is_lost:
            found.n_lost += 1
            if n_tried[item] < N_TRIES:
                waiting.append(item)
            else:
                found.n_given_up += 1
                n_left -= 1
            again = now + workers.reading(1)
            ends[worker] = again + life()
            heapq.heappush(events, (again, next(order), worker, None, False))
        else:
            n_left -= item is not None
            idle.append(worker)
        while idle and waiting:
            worker, index = idle.popleft(), waiting.popleft()
            n_tried[index] += 1
            driver = max(now, driver) + workers.overhead_seconds
            done = driver + item_seconds[index] * factors[worker]
            is_lost = done > ends[worker]
            when = max(driver, ends[worker]) if is_lost else done
            heapq.heappush(events, (when, next(order), worker, index, is_lost))
        found.seconds = now
    return found


def check(record: WorkersRecord) -> str:
    """The two warm workers that were measured, simulated."""
    lines = []
    for n, seconds in enumerate(record.seconds, start=1):
        guess = simulate(record.item_seconds, Workers(n, overhead_seconds=record.overhead_seconds)).seconds
        lines.append(f"{n} warm: simulated {guess:.1f} s, measured {seconds:.1f} s ({guess / seconds - 1:+.1%})")
    return "; ".join(lines)


def n_draws(n_workers: int) -> int:
    """Seeds that a mean is of: few workers seldom have a straggler among them."""
    return 2000 if n_workers <= 8 else 100


def table(record: WorkersRecord, times: int) -> list[str]:
    """The rows of a search of so many times as many items."""
    items = [*record.item_seconds] * times
    given = Workers(1, record.start_seconds, record.overhead_seconds, record.weights_mib)
    alone = simulate(items, given).seconds
    rows = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for n in WORKERS:
        plain = replace(given, n=n)
        warm = simulate(items, replace(plain, start_seconds=0.0, weights_mib=0.0)).seconds
        cold = simulate(items, plain).seconds
        seeds = range(n_draws(n))
        late = [simulate(items, replace(plain, slow_share=SLOW_SHARE, seed=seed)) for seed in seeds]
        lost = [simulate(items, replace(plain, hours_to_failure=HOURS, seed=seed)) for seed in seeds]
        slow, middle = (statistics.mean(each.seconds for each in some) for some in (late, lost))
        ended, given_up = (statistics.mean(getattr(each, name) for each in lost) for name in ("n_lost", "n_given_up"))
        cells = [f"{n}", _shown(warm), _shown(cold), f"{alone / cold:.1f}", f"{alone / cold / n:.0%}", _shown(slow)]
        rows.append(f"| {' | '.join([*cells, _shown(middle), f'{ended:.1f}', f'{given_up:.2f}'])} |")
    return rows


def _shown(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"


def main() -> None:
    """The tables of every measured model."""
    for record in read_record(RESULTS, list[WorkersRecord]):
        each = f"{statistics.mean(record.item_seconds):.2f} s ({min(record.item_seconds):.2f} to "
        each += f"{max(record.item_seconds):.2f})"
        about = f"an item takes {each}, a worker starts in {record.start_seconds:.0f} s"
        note = f" ({record.note})" if record.note else ""
        tell(f"{record.model}: {about}{note}; {check(record)}\n")
        for times in (1, TIMES_LARGER):
            tell(f"{times * len(record.item_seconds)} items:\n")
            tell("\n".join(table(record, times)) + "\n")


if __name__ == "__main__":
    main()
