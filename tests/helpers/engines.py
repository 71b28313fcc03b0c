"""Engines that need no cluster, and jobs that go wrong."""

import os
import pickle
import random
import signal
from dataclasses import dataclass
from pathlib import Path

from refusal_mi.engine.jobs import ItemsFailed
from refusal_mi.search.sweep import Scorer


@dataclass(frozen=True)
class Shuffled:
    """Does items in one random order, each on one of several copies of the job, and gives the results in another."""

    seed: int
    n_copies: int = 2
    times: int = 1
    """How often every item is done, and its result given."""

    def run(self, job, model, items):
        draw = random.Random(self.seed)
        works = [pickle.loads(pickle.dumps(job)).start(model) for _ in range(self.n_copies)]
        order = [index for index in range(len(items)) for _ in range(self.times)]
        draw.shuffle(order)
        results = [(index, pickle.loads(pickle.dumps(draw.choice(works)(items[index])))) for index in order]
        draw.shuffle(results)
        yield from results


class Remembering(Scorer):
    """Its scores depend, by less than rounding, on how many items ran before."""

    n_before = 0

    def start(self, model):
        return self.run

    def __getstate__(self):
        return vars(self) | {"model": None, "passes": None}

    def run(self, item):
        self.n_before += 1
        return super().run(item) * (1 + 1e-13 * self.n_before)


@dataclass(frozen=True)
class Squares:
    """Squares numbers; what else it does is told by the item, and every try leaves a line in a file."""

    log: Path

    def start(self, model):
        return self.square

    def square(self, item):
        with self.log.open("a") as file:
            file.write(f"{item}\n")
        if item == "raises":
            raise ArithmeticError("no square of a word")
        if item == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return item**2


@dataclass(frozen=True)
class Poisoned:
    """Does all items but those of one name, and says so at the end."""

    name: str

    def run(self, job, model, items):
        work = job.start(model)
        for index, item in enumerate(items):
            if str(item) != self.name:
                yield index, work(item)
        if n := sum(str(item) == self.name for item in items):
            raise ItemsFailed(f"{n} of {n} items failed: {self.name}")
