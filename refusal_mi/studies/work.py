"""The work of one model's cells: here, or in a process of its own, whose end ends nothing else."""

import multiprocessing
import os
import signal
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..engine.named import engine_named
from ..errors import UserError, cause
from ..figures.methods import plot_cost, plot_ratios
from ..figures.save import save_figures
from ..files import read_record, write_record
from ..model.loading import quiet_load, resolve_source
from ..model.points import HookedModel
from ..model.provenance import ModelRecord, describe_model, versions
from ..recipes.arditi import run
from ..recipes.methods import compare_methods
from ..run.folder import RunInputs
from ..run.record import RUN, RunInfo
from ..run.stages import Origin, RunFolder
from ..terminal import say
from .spec import Cell, StudyModel
from .table import CellRows, numbers

ROWS = "rows.json"
REPLACED = "replaced"
"""Folder of the study for runs of a model that had another one's name before."""


@dataclass(frozen=True)
class Failure:
    """Why a cell, or its whole model, has no numbers: `failed.json`."""

    reason: str
    of_model: bool
    created: str


@dataclass(frozen=True)
class Work:
    """One model's part of a study; where it is done, it is loaded once."""

    folder: Path
    model: StudyModel
    fresh: bool = False
    engine: str = "local"
    n_workers: int | None = None


class Here:
    """In this process."""

    def __init__(self, work: Work) -> None:
        self.work, self._stack = work, ExitStack()
        self._model: HookedModel | None = None

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None
        self._stack.close()

    def load(self) -> Failure | None:
        """Load the model, and start the engine."""
        work = self.work
        try:
            if self._model is None:
                self._engine = self._stack.enter_context(engine_named(work.engine, work.n_workers))
                self._model = quiet_load(resolve_source(work.model.source), **work.model.how)
        except Exception as error:  # of foreign code: it ends this model's part of the study, and nothing else
            return failure(error, of_model=True)
        return None

    def do(self, cell: Cell) -> Failure | None:
        """Load the model if need be, and compute a cell."""
        failed = self.load()
        if failed is None:
            assert self._model is not None
            try:
                _compute(self._model, cell, self.work, self._engine)
            except Exception as error:  # the same
                return failure(error, of_model=False)
        return failed


class Apart:
    """In a process of its own, which ends with this one."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None

    def do(self, cell: Cell) -> Failure | None:
        """Send a cell there; after a failure, the next one finds a new process."""
        failed = self.load()
        if failed is None:
            with suppress(ConnectionError):  # it ended: the answer says so
                self._pipe.send(cell)
            failed = self._answer(of_model=False)
        return failed

    def load(self) -> Failure | None:
        """Start the process, if there is none."""
        if self._process is not None:
            return None
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        process = spawning.Process(target=_serve, args=(theirs, self.work), daemon=True)
        try:
            process.start()
        except Exception as error:  # such as no memory for it
            self._pipe.close()
            return failure(error, of_model=True)
        finally:
            theirs.close()
        self._process = process
        return self._answer(of_model=True)

    def _answer(self, *, of_model: bool) -> Failure | None:
        try:
            answer: Failure | None = self._pipe.recv()
        except (EOFError, ConnectionError):
            answer = self._ending(of_model)
        if answer is not None:
            self.__exit__()
        return answer

    def _ending(self, of_model: bool) -> Failure:
        self._process.join()
        code = self._process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        memory = ", as where memory runs out" if code == -signal.SIGKILL else ""
        return Failure(f"its process {how}{memory}", of_model, now())


def _serve(pipe: Connection, work: Work) -> None:
    """What the other process does: load the model, say so, then one cell after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Here(work) as here:
        pipe.send(here.load())
        while True:
            try:
                cell = pipe.recv()
            except EOFError:
                return
            pipe.send(here.do(cell))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def failure(error: Exception, *, of_model: bool) -> Failure:
    """What a study says of an error: a line."""
    if isinstance(error, UserError):
        reason = str(error)
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        reason = f"out of memory: {cause(error)}"
    else:
        reason = f"{type(error).__name__}: {cause(error)}"
    return Failure(reason, of_model, now())


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _compute(model: HookedModel, cell: Cell, work: Work, engine: Any) -> None:
    """An ordinary run folder with its comparison of methods, and the rows of both."""
    source, path = resolve_source(cell.model.source), work.folder / cell.folder
    record = describe_model(model, source)
    _make_room(work.folder, cell, record)

    def report(line: str) -> None:
        say(f"{cell.name}: {line}")

    summary = run(model, source, cell.options, RunFolder(path, work.fresh, report), engine=engine)
    compared = None
    if cell.methods and summary.direction is not None:
        options = cell.compared
        folder = RunFolder(path / "methods", work.fresh, report)
        compared = compare_methods(
            RunInputs(model, path, options.n_prompts),
            cell.methods,
            folder=folder,
            kl_tokens=options.kl_tokens,
            n_places=options.n_places,
            n_random=options.n_random,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            engine=engine,
        )
        name = record.name
        save_figures(
            {"cost": plot_cost(compared, model=name), "ratios": plot_ratios(compared, model=name)}, folder.path
        )
    rows = numbers(summary, compared)
    found = CellRows(summary.status, now(), record, versions(), cell.options.quick, rows)
    write_record(path / ROWS, found)


def _make_room(study: Path, cell: Cell, model: ModelRecord) -> None:
    """Move a run of another model, or of another commit of it, out of a cell's folder."""
    path, there = study / cell.folder, study / cell.folder / RUN
    if not there.is_file():
        return
    before = read_record(there, RunInfo).model
    is_at = Origin(before.source, before.revision, before.fingerprint).is_at(model.source)
    if not is_at or before.revision != model.revision:
        first = target = study / REPLACED / cell.folder
        number = 1
        while target.exists():  # an earlier run that was replaced
            number += 1
            target = first.with_name(f"{first.name}-{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        say(f"{cell.name}: the run of {before.name} that was here is now in {target}")
