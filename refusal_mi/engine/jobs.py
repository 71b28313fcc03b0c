"""Work in pure items: what is done with each, and who does it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import UserError
from ..model.points import HookedModel


@runtime_checkable
class Job(Protocol):
    """What is done with a model, item by item. It, its items and their results can be pickled; nothing is drawn at
    random, and an item gives the same numbers whatever was done before it."""

    def start(self, model: HookedModel) -> Callable[[Any], Any]:
        """Get ready, once for each copy of the model; what comes back does one item."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Does the items of jobs; where functions take one, None is this process, one item after the other."""

    def run(self, job: Job, model: HookedModel, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Index and result of every item, as they are done, in any order.

        Args:
            model: as it is here; other processes load the same one.
        """
        ...


@dataclass(frozen=True)
class Timed:
    """A job whose results come with the seconds that each took."""

    job: Job

    def start(self, model: HookedModel) -> Callable[[Any], tuple[float, Any]]:
        """Get that job ready."""
        work = self.job.start(model)

        def timed(item: Any) -> tuple[float, Any]:
            begun = time.perf_counter()
            result = work(item)
            return time.perf_counter() - begun, result

        return timed


class ItemsFailed(UserError):
    """Some items failed as often as they may be tried; the results of all others were given before."""
