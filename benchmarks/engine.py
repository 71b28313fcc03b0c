"""Two Ray workers of one thread against one, on the same items of a search; what an item costs beside its work.

`python -m benchmarks.engine [MODEL [RUN_DIR]]` scores a fixed slice of RUN_DIR's candidates (found by `refusal-mi run`)
with one warm worker, for at least five minutes, and with two; before it, the overhead is taken on the embedded model.
What every item took is kept in `results-engine.json`, from which `benchmarks.engine_model` simulates more workers.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import ray
import torch

from refusal_mi.directions import difference_in_means
from refusal_mi.engine.cluster import RayEngine
from refusal_mi.engine.jobs import Timed
from refusal_mi.files import as_json, read_record, write_json
from refusal_mi.model.loading import quiet_load
from refusal_mi.model.points import HookedModel, parameters_of
from refusal_mi.model.provenance import display_name
from refusal_mi.reading import mean_activations
from refusal_mi.run.folder import RunInputs
from refusal_mi.search.sweep import Scorer, ScoreTable, WorkItem, cut
from refusal_mi.terminal import tell
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_WARM = 4
"""Items that every engine does before the clock starts; several for each worker."""
MOST_DIFFERENCE = 1e-5
RESULTS = Path(__file__).parent / "results-engine.json"


@dataclass(frozen=True)
class WorkersRecord:
    """What items of one search took, and what one worker and two took for all of them."""

    model: str
    n_prompts: int
    item_seconds: tuple[float, ...]
    """Of every item, by one worker alone."""
    seconds: tuple[float, ...]
    """Of one worker and of two, warm, for all items."""
    start_seconds: float
    """From asking for a worker to its first result, less that item: process, imports, weights, plain passes."""
    overhead_seconds: float
    """What an item of the embedded model takes beside its work."""
    weights_mib: float
    note: str = ""
    """What of this was not measured."""


def of_run(model: HookedModel, folder: Path, n_prompts: int) -> Scorer:
    """The search of a run, on so many of its validation prompts a side."""
    run = RunInputs(model, folder, max_prompts=n_prompts)
    sides = (run.prompts(side, "val") for side in ("harmful", "harmless"))
    return Scorer(model, run.chat, run.grid, *sides, [run.refusal_prefixes])


def of_embedded(n_prompts: int) -> Scorer:
    """A search of the embedded model."""
    model = quiet_load(device="cpu")
    chat = ChatFormat(model.tokenizer)
    sides = [load_prompts(f"organism_{side}_train").instructions for side in ("harmful", "harmless")]
    grid = difference_in_means(*(mean_activations(model, chat, side[:64]) for side in sides))
    return Scorer(model, chat, grid, *(side[64 : 64 + n_prompts] for side in sides), [[43]])


def items_of(scorer: Scorer) -> list[WorkItem]:
    """Every candidate's ablation and addition as an item of its own, in turns, from both ends of the layers."""
    places, n, n_harmful = ScoreTable(scorer).open, scorer.n_prompts, scorer.n_harmful
    places = [place for pair in zip(places, reversed(places), strict=True) for place in pair][: len(places)]
    kinds = (
        [cut("ablate", [place], range(n)) for place in places],
        [cut("add", [p], range(n_harmful, n)) for p in places],
    )
    return list(chain.from_iterable(chain(*each) for each in zip(*kinds, strict=True)))


@dataclass(frozen=True)
class Measured:
    """All items, done by warm workers."""

    seconds: float
    item_seconds: tuple[float, ...]
    start_seconds: float
    scores: list[torch.Tensor]


def measure(scorer: Scorer, items: Sequence[WorkItem], n_workers: int) -> Measured:
    """Seconds of the items after the warm ones, and the scores."""
    job = Timed(scorer)
    with RayEngine(n_workers=n_workers) as engine:
        start = time.perf_counter()
        ((_, (first, _)),) = engine.run(job, scorer.model, items[:1])
        begun = time.perf_counter() - start - first
        list(engine.run(job, scorer.model, [items[0]] * N_WARM * n_workers))
        start = time.perf_counter()
        found = dict(engine.run(job, scorer.model, items))
        seconds = time.perf_counter() - start
    each, scores = zip(*(found[index] for index in range(len(items))), strict=True)
    return Measured(seconds, each, begun, list(scores))


def here(scorer: Scorer, items: Sequence[WorkItem]) -> tuple[float, list[torch.Tensor]]:
    """The same in this process."""
    scorer.run(items[0])
    start = time.perf_counter()
    found = [scorer.run(item) for item in items]
    return time.perf_counter() - start, found


def largest(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest difference of any score, nats."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def compare_workers(name: str, scorer: Scorer, seconds: float) -> tuple[WorkersRecord, float]:
    """One worker and two on so many items that one takes these seconds; and the largest difference of a score."""
    items = items_of(scorer)
    scorer.run(items[0])
    each = statistics.mean(here(scorer, items[start : start + 2])[0] / 2 for start in (0, 2))
    n = min(len(items), 2 * math.ceil(1.1 * seconds / each / 2))
    items = list(islice(items, n))
    one, two = measure(scorer, items, 1), measure(scorer, items, 2)
    difference = max(largest(one.scores, two.scores), largest(here(scorer, items[:4])[1], one.scores[:4]))
    tell(f"{name}: {n} items, {scorer.n_prompts} prompts, threads of a worker: 1")
    tell(f"| workers | seconds | times one worker |\n|---|---|---|\n| 1 | {one.seconds:.1f} | 1 |")
    tell(f"| 2 | {two.seconds:.1f} | {one.seconds / two.seconds:.2f} |")
    tell(f"largest difference of a score, two workers or this process against one: {difference:.1e} nats")
    size = sum(each.numel() * each.element_size() for each in parameters_of(scorer.model)) / 2**20
    took = (one.seconds, two.seconds)
    return WorkersRecord(name, scorer.n_prompts, one.item_seconds, took, one.start_seconds, 0.0, size), difference


def overhead(scorer: Scorer, n_items: int = 40, n_rounds: int = 5) -> float:
    """Seconds that an item takes beside its work: one worker against this process, alternately."""
    items = items_of(scorer)[:n_items]
    with RayEngine(n_workers=1) as engine:
        list(engine.run(scorer, scorer.model, items[:1]))
        extra, plain = [], []
        for _ in range(n_rounds):
            plain.append(here(scorer, items)[0] / len(items))
            start = time.perf_counter()
            list(engine.run(scorer, scorer.model, items))
            extra.append((time.perf_counter() - start) / len(items) - plain[-1])
    found = f"{1e3 * statistics.median(extra):.1f} ms ({1e3 * min(extra):.1f} to {1e3 * max(extra):.1f})"
    tell(f"embedded model: {found} more per item of {1e3 * statistics.median(plain):.0f} ms, {n_rounds} rounds")
    return statistics.median(extra)


def keep(record: WorkersRecord) -> None:
    """Write a record into the results, in place of an earlier one of its model."""
    there = read_record(RESULTS, list[WorkersRecord]) if RESULTS.exists() else []
    kept = [each for each in there if each.model != record.model]
    write_json(RESULTS, as_json(sorted([*kept, record], key=lambda each: each.model)))


def main() -> None:
    """The tables; status 1 where scores differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("run_dir", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="What one worker is to take, at least.")
    parser.add_argument("--n-prompts", type=int, default=16, help="Validation prompts a side.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    extra = overhead(of_embedded(asked.n_prompts))
    if asked.run_dir is None:
        scorer = of_embedded(64)
    else:
        scorer = of_run(quiet_load(asked.model, device="cpu"), asked.run_dir, asked.n_prompts)
    name = "embedded model" if asked.run_dir is None else display_name(asked.model)
    record, difference = compare_workers(name, scorer, asked.seconds)
    keep(replace(record, overhead_seconds=max(0.0, extra)))
    raise SystemExit(difference > MOST_DIFFERENCE)


if __name__ == "__main__":
    main()
