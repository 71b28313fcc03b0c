"""Stages of a folder that do not need each other: one after the other, or side by side where an engine is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..engine.jobs import Engine, Job, Timed
from ..model.points import HookedModel
from ..progress import track
from ..run.stages import RunFolder


class NothingToDo(Exception):
    """There is no item to a stage, and why."""


@dataclass(frozen=True)
class Piece:
    """A stage whose work is one item of a job."""

    name: str
    inputs: Mapping[str, Any]
    outputs: Sequence[str]
    about: str
    item: Callable[[], Any]
    """Makes the item, where the stage is not done yet; raises `NothingToDo` where there is none."""
    write: Callable[[Any], None]
    """Writes the outputs from the item's result."""


@dataclass
class Pieces:
    """Does stages of one folder by one job; files are written by this process alone, each when its result is there."""

    folder: RunFolder
    job: Job
    model: HookedModel
    engine: Engine | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Stage without an item -> why."""

    @cached_property
    def work(self) -> Callable[[Any], Any]:
        """What does an item in this process."""
        return self.job.start(self.model)

    @cached_property
    def timed(self) -> Timed:
        """The job as an engine does it; the same one every time, so that workers stay ready."""
        return Timed(self.job)

    def run(self, pieces: Sequence[Piece]) -> dict[str, str]:
        """The hashes of the outputs of all stages that are done now.

        Raises:
            ItemsFailed: an engine could not do some; the others are kept.
        """
        hashes: dict[str, str] = {}
        with self.folder.locked():
            waiting = [(each, item) for each in pieces for item in self._items(each, hashes)]
            results = self.engine.run(self.timed, self.model, [item for _, item in waiting]) if waiting else ()  # type: ignore[union-attr]
            for index, (seconds, result) in track(results, "stages side by side", total=len(waiting)):
                hashes |= self._stage(waiting[index][0], result, seconds)
        return hashes

    def _items(self, piece: Piece, hashes: dict[str, str]) -> list[Any]:
        """The item of a stage that an engine has to do; here, it is done at once."""
        try:
            if self.engine is not None and self.folder.done(piece.name, piece.inputs, piece.outputs) is None:
                return [piece.item()]
            compute = lambda: piece.write(self.work(piece.item()))  # noqa: E731
            hashes |= self.folder.stage(piece.name, piece.inputs, piece.outputs, compute, about=piece.about)
        except NothingToDo as why:
            self.left_out[piece.name] = str(why)
        return []

    def _stage(self, piece: Piece, result: Any, seconds: float) -> dict[str, str]:
        write = lambda: piece.write(result)  # noqa: E731
        how: dict[str, Any] = {"about": piece.about, "seconds_elsewhere": seconds}
        return self.folder.stage(piece.name, piece.inputs, piece.outputs, write, **how)
