"""A study: every cell once, what it came to in one table; what was killed goes on, what changed is done again."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from ..engine.named import LOCAL, engine_named
from ..errors import UserError
from ..files import is_alive, read_record, write_record, write_text
from ..run.record import RUN
from ..run.stages import RunFolder
from ..terminal import say
from .spec import Cell, Study
from .table import TABLE, CellRows, TableRow, table_rows, write_table
from .work import ROWS, Apart, Failure, Here, Work, failure

FAILED, RUNNING, FILE = "failed.json", "running.json", "study.yaml"
Record = TypeVar("Record")
State = Literal["done", "running", "failed", "changed", "left"]
"""changed: what it depends on is not what it was computed from."""


@dataclass(frozen=True)
class CellState:
    """How far a cell is."""

    cell: Cell
    state: State
    found: CellRows | None = None
    failed: Failure | None = None

    @property
    def says(self) -> str:
        """How its run ended, what went wrong, or how far it is."""
        return self.found.status if self.found else self.failed.reason if self.failed else self.state


@dataclass(frozen=True)
class _Running:
    """`running.json`: the cell at work, and whose work it is."""

    folder: str
    process: int
    machine: str


class _CellFailed(Exception):
    """Its stage was not finished."""

    def __init__(self, failed: Failure) -> None:
        super().__init__(failed.reason)
        self.failed = failed


def run_study(
    study: Study,
    path: Path,
    *,
    fresh: bool = False,
    engine: str = LOCAL,
    n_workers: int | None = None,
    apart: bool = False,
    text: str | None = None,
) -> Iterator[CellState]:
    """Do what is left of a study; yields every cell as it ends, and keeps `study.parquet` up to date.

    A cell is a stage of the study's folder, and a run folder with stages of its own: what was finished from the same
    inputs is kept, and numbers are those of a study that nobody killed. A model or cell that fails is named in the
    table and tried again by the next call; the others go on.

    Args:
        path: the study's folder.
        fresh: whether to compute every stage again.
        engine: of the runs, as `engine.named.engine_named` takes it.
        apart: whether each model has a process of its own, so that one that runs out of memory ends no other. A script
            that asks for it needs `if __name__ == "__main__":`, as each process imports the script anew.
        text: of the study's file, which is kept beside the table as `study.yaml`.

    Raises:
        UserError: another process works on it, its folder is another thing's, or there is no such engine.
    """
    folder = RunFolder(path, fresh, say)
    folder.check_writable()
    if (path / RUN).exists():
        raise UserError(f"{path} is the folder of a run: choose another --output-dir for the study, or another name")
    if engine != LOCAL or n_workers is not None:
        with engine_named(engine, n_workers):  # what is wrong with it shows now
            pass
    with folder.locked():
        if text is not None:
            write_text(path / FILE, text)
        known = {each.cell.folder: each for each in states(study, path)}
        try:
            for cells in study.by_model.values():
                (path / cells[0].model.name / FAILED).unlink(missing_ok=True)
                work = Work(path, cells[0].model, fresh, engine, n_workers)
                with (Apart if apart else Here)(work) as worker:
                    for cell in cells:
                        ended = _done(folder, cell, worker)
                        is_all = ended.failed is not None and ended.failed.of_model
                        not_done = [each for each in cells if known[each.folder].state != "done"]
                        known |= {
                            each.folder: replace(ended, cell=each) for each in [cell, *(not_done if is_all else ())]
                        }
                        _write_table(path, list(known.values()))
                        yield ended
                        if is_all:
                            break
        finally:
            (path / RUNNING).unlink(missing_ok=True)


def states(study: Study, path: Path) -> list[CellState]:
    """How far every cell is; takes no lock and starts nothing."""
    running = _running(path)
    found = []
    for cells in study.by_model.values():
        contents = None
        with suppress(UserError):  # there is no such model now
            contents = cells[0].model.contents()
        found += [_state(cell, path, running, contents) for cell in cells]
    return found


def _done(folder: RunFolder, cell: Cell, worker: Here | Apart) -> CellState:
    """Do a cell, if it is not done."""
    path = folder.path
    (path / cell.folder / FAILED).unlink(missing_ok=True)
    write_record(path / RUNNING, _Running(cell.folder, os.getpid(), platform.node()))
    try:
        contents = cell.model.contents()
        if contents is None:  # a hub's model that was never here
            _raise(worker.load())
            contents = cell.model.contents()
        if not cell.is_repeatable:
            folder = replace(folder, fresh=True)
        folder.stage(_stage(cell), cell.inputs(contents), _outputs(cell), lambda: _raise(worker.do(cell)))
    except UserError as error:
        return _failed(cell, path, failure(error, of_model=True))
    except _CellFailed as error:
        return _failed(cell, path, error.failed)
    finally:
        (path / RUNNING).unlink(missing_ok=True)
    return CellState(cell, "done", read_record(path / cell.folder / ROWS, CellRows))


def _raise(failed: Failure | None) -> None:
    if failed is not None:
        raise _CellFailed(failed)


def _failed(cell: Cell, path: Path, failed: Failure) -> CellState:
    write_record(path / (cell.model.name if failed.of_model else cell.folder) / FAILED, failed)
    say(f"{cell.model.name if failed.of_model else cell.name}: failed: {failed.reason}")
    return CellState(cell, "failed", failed=failed)


def _state(cell: Cell, path: Path, running: str | None, contents: str | None) -> CellState:
    if running == cell.folder:
        return CellState(cell, "running")
    rows = path / cell.folder / ROWS
    if contents is not None and RunFolder(path).is_done(_stage(cell), cell.inputs(contents), _outputs(cell)):
        found = _if_there(rows, CellRows)
        if found is not None:
            return CellState(cell, "done", found)
    for mark in (path / cell.model.name / FAILED, path / cell.folder / FAILED):
        failed = _if_there(mark, Failure)
        if failed is not None:
            return CellState(cell, "failed", failed=failed)
    return CellState(cell, "changed" if rows.is_file() else "left")


def _if_there(path: Path, kind: type[Record]) -> Record | None:
    """What a file says; None where there is none, also if the process at work takes it away meanwhile."""
    try:
        return read_record(path, kind)
    except UserError:
        if path.is_file():
            raise
        return None


def _stage(cell: Cell) -> str:
    """No name has a +, so that no two cells share a stage."""
    return cell.folder.replace("/", "+")


def _outputs(cell: Cell) -> list[str]:
    return [f"{cell.folder}/{ROWS}"]


def _running(path: Path) -> str | None:
    """The folder of the cell at work; of a process of another machine it cannot be told whether it still is."""
    found = _if_there(path / RUNNING, _Running)
    if found is None:
        return None
    return found.folder if found.machine != platform.node() or is_alive(found.process) else None


def _write_table(path: Path, cells: Sequence[CellState]) -> None:
    rows: list[TableRow] = []
    for each in cells:
        cell, failed = each.cell, each.failed
        if each.found is not None:
            rows += table_rows(cell.model.name, cell.data, cell.seed, cell.folder, each.found)
        elif failed is not None and not failed.of_model:
            rows.append(
                TableRow.failed(cell.model.name, cell.folder, failed.reason, failed.created, cell.data, cell.seed)
            )
        elif failed is not None:
            row = TableRow.failed(cell.model.name, cell.model.name, failed.reason, failed.created, None, None)
            rows += [row] if row not in rows else []
    write_table(path / TABLE, rows)
