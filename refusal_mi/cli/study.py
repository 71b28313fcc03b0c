"""`refusal-mi study`: models, prompts, seeds and methods of one file, in one folder and one table."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, cause
from ..options import MEANINGS, number_or_auto
from ..values import check_named
from .config import option_words, options_by_name, options_of, read_text
from .options import SCIENCE_FAILED, AsJson, Engine, Fresh, ModelOptions, OutputDir, Workers, at_least, bundled

if TYPE_CHECKING:
    from ..studies.spec import Cell, Study
    from ..studies.study import CellState

KEYS = ("name", "models", "data", "methods", "seeds", "options")
PROMPTS = ("harmful", "harmless", "eval_set", "harmless_eval_set", "column", "text_set", "instruction_set")
"""What a set of prompts may say."""
EMBEDDED = "embedded"
BUNDLED = "bundled"
COMMANDS = ("run", "compare-methods")
ELSEWHERE = {
    "seed": "under seeds",
    "seeds": "under seeds",
    "methods": "under methods",
    "model": "under models",
    "model_path": "under models",
    "run": "by the study",
    "output_dir": "by the study",
    "engine": "on the command line (--engine)",
    "workers": "on the command line (--workers)",
    "images": "on the command line (--images)",
    "fresh": "on the command line (--fresh)",
    "json": "on the command line (--json)",
    "directions": "by no study, which removes what its methods name",
    "multi": "by no study, which removes what its methods name",
    "over_refusal": "by no study: refusal-mi compare-methods --run FOLDER of a cell takes it",
    "capability": "by no study: refusal-mi compare-methods --run FOLDER of a cell takes it",
}
"""Options of the commands that a file's options cannot set, and where they are set."""


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A .yaml file: models, data, methods, seeds, options.")],
    status: Annotated[bool, typer.Option("--status", help="Print how far it is, and start nothing.")] = False,
    engine: Engine = "local",
    workers: Workers = None,
    images: Annotated[bool, typer.Option("--images", help=MEANINGS["images"])] = False,
    fresh: Fresh = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Run many models, prompts, seeds and methods.

    Each model, set of prompts and seed has an ordinary run folder in which the methods are compared. All numbers are
    in one table, study.parquet. What was killed goes on; what changed is done again; a model that fails ends no other.
    """
    from ..figures.save import check_images
    from ..report.page import write_report
    from ..studies.page import write_page
    from ..studies.study import run_study, states
    from ..studies.table import read_table
    from ..terminal import say
    from .tables import print_json

    if status and (engine != "local" or workers is not None or images or fresh):
        raise UserError(
            "--status starts nothing and draws nothing: leave --engine, --workers, --images and --fresh out"
        )
    text = read_text(file)
    asked = read_study(file, text)
    path = output_dir or Path("runs") / asked.name
    if not status:
        if images:
            check_images()
        for ended in run_study(asked, path, fresh=fresh, engine=engine, n_workers=workers, apart=True, text=text):
            if ended.found is not None and not (path / ended.cell.folder / "report.html").exists():
                try:
                    write_report(path / ended.cell.folder)
                except Exception as error:  # the numbers are there, and the other cells go on
                    say(f"{ended.cell.name}: no report: {cause(error)}")
    found = states(asked, path)
    if not status:
        write_page(path, asked.name, found, read_table(path), images=images)
    print_json(_as_json(found, path)) if as_json else _print(found, path)
    return SCIENCE_FAILED if any(each.state == "failed" for each in found) else 0


def _print(found: "list[CellState]", path: Path) -> None:
    from .tables import Console, Table, one_line, print_lines

    table = Table("model", "prompts", "seed", "state", "")
    for each in found:
        cell, says = each.cell, "" if each.says == each.state else each.says
        table.add_row(cell.model.name, cell.data, str(cell.seed), each.state, one_line(says))
    Console().print(table)
    n_done = sum(each.state == "done" for each in found)
    print_lines(f"{n_done} of {len(found)} cells are done; the table, the page and the run folders: {path}")


def _as_json(found: "list[CellState]", path: Path) -> dict[str, Any]:
    cells = [
        {"model": each.cell.model.name, "data": each.cell.data, "seed": each.cell.seed, "state": each.state}
        | {"says": each.says, "folder": str(path / each.cell.folder)}
        for each in found
    ]
    return {"folder": str(path), "cells": cells}


def read_study(path: Path, text: str | None = None) -> "Study":
    """A study's file.

    Args:
        text: what it says, if it was read already.

    Raises:
        UserError: it is no such file, or a key, option or method in it does not exist; the message names a near one.
    """
    from ..recipes.methods import check_methods
    from ..studies.spec import Study

    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"a study is a .yaml file, not {path}")
    held = options_of(path, read_text(path) if text is None else text)
    for key in held:
        check_named(f"key of {path}", key, KEYS)
    models = [_model(path, each) for each in _listed(path, held, "models", [EMBEDDED])]
    data = [_data(path, each) for each in _listed(path, held, "data", [BUNDLED])]
    seeds = _listed(path, held, "seeds", [42])
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise UserError(f"{path}: seeds are whole numbers, not {seeds}")
    options = _options(path, held.get("options") or {})
    methods = ",".join(map(str, _listed(path, held, "methods", [])))
    cells = [
        _cell(path, *model, *prompts, seed, methods, options) for model in models for prompts in data for seed in seeds
    ]
    check_methods(cells[0].methods if cells else ())
    name = held.get("name", path.stem)
    if not isinstance(name, str):
        raise UserError(f"{path}: the name is a text, not {name!r}")
    return Study(name, tuple(cells))


def _listed(path: Path, held: Mapping[str, Any], key: str, default: list[Any]) -> list[Any]:
    """One or several values of a key."""
    value = held.get(key)
    if value is None:
        return default
    found = value if isinstance(value, list) else [value]
    if not found:
        raise UserError(f"{path}: {key} is an empty list")
    return found


def _model(path: Path, entry: Any) -> tuple[str, str | None, dict[str, Any]]:
    """Short name, source, and options of loading."""
    said = {"model": entry} if isinstance(entry, str) else entry
    if not isinstance(said, dict) or not said.get("model") or not isinstance(said["model"], str):
        raise UserError(f"{path}: a model is a directory, a hub id, {EMBEDDED}, or a table with model: and name:")
    known = [each.name for each in fields(ModelOptions) if each.name not in ("model", "model_path")]
    for key in said:
        check_named(f"key of a model in {path}", key, ["model", "name", *known])
    source = said["model"]
    is_local = source[0] in "./~" or source.count("/") != 1 or Path(source).exists()
    base = Path(source).name if is_local else source.replace("/", "--")
    rest = {key: value for key, value in said.items() if key not in ("model", "name")}
    return str(said.get("name", base)), None if source == EMBEDDED else source, rest


def _data(path: Path, entry: Any) -> tuple[str, dict[str, Any]]:
    """What a set of prompts is called, and its options."""
    if entry == BUNDLED:
        return BUNDLED, {}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{path}: data are {BUNDLED}, or a table with name: and {', '.join(PROMPTS)}")
    for key in entry:
        check_named(f"key of data in {path}", key, ("name", *PROMPTS))
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _options(path: Path, held: Any) -> dict[str, dict[str, Any]]:
    """Command -> its options: those of both, and those of a table that is named after it."""
    if not isinstance(held, dict):
        raise UserError(f"{path}: options are a table of names and values, not {held!r}")
    known = {name: _settable(name) for name in COMMANDS}
    found: dict[str, dict[str, Any]] = {name: {} for name in COMMANDS}
    general = {key: value for key, value in held.items() if not (key in COMMANDS and isinstance(value, dict))}
    _check_twice(path, general)
    for key, value in general.items():
        name = _free(path, key, {each for names in known.values() for each in names})
        for command in COMMANDS:
            found[command] |= {name: value} if name in known[command] else {}
    for command in COMMANDS:
        own = held.get(command)
        _check_twice(path, own if isinstance(own, dict) else ())
        for key, value in own.items() if isinstance(own, dict) else ():
            found[command][_free(path, key, known[command])] = value
    return found


def _settable(command: str) -> set[str]:
    """The options of a command that a study hands on."""
    from ..studies.spec import MethodsOptions

    known = set(options_by_name(_command(command)))
    return known & {"k", *(each.name for each in fields(MethodsOptions))} if command == "compare-methods" else known


def _check_twice(path: Path, keys: Iterable[Any]) -> None:
    """No option is there under two spellings, of which one would be passed over."""
    names: dict[str, Any] = {}
    for key in keys:
        other = names.setdefault(_option_name(key), key)
        if other is not key:
            raise UserError(f"{path} sets one option twice, as {other} and as {key}: leave one out")


def _option_name(key: Any) -> str:
    return str(key).removeprefix("--").replace("-", "_")


def _free(path: Path, key: Any, known: Any) -> str:
    """An option's name, if a study's file may set it."""
    name = _option_name(key)
    if name in ELSEWHERE:
        raise UserError(f"{path}: the option {name} is set {ELSEWHERE[name]}")
    check_named(f"option in {path}", name, sorted(set(known) - set(ELSEWHERE)))
    return name


def _cell(
    path: Path,
    name: str,
    source: str | None,
    loading: Mapping[str, Any],
    data: str,
    prompts: Mapping[str, Any],
    seed: int,
    methods: str,
    options: Mapping[str, Mapping[str, Any]],
) -> "Cell":
    from ..estimators.names import parse_methods
    from ..model.loading import resolve_source
    from ..recipes.options import default_options
    from ..studies.spec import Cell, MethodsOptions, StudyModel
    from .run import run

    given = bundled(run, _values(path, "run", {**options["run"], **loading, **prompts, "seed": seed}))
    try:
        where = resolve_source(source)
    except UserError as error:  # the study says so in its table, and goes on
        where = str(source or error)
    wanted = given["given"].over(default_options(where))
    if wanted.quick:
        wanted = wanted.shortened()
    of_methods = _values(path, "compare-methods", options["compare-methods"])
    most = at_least("k", of_methods["k"], 1, 4)
    kept = {each.name: of_methods[each.name] for each in fields(MethodsOptions) if each.name != "batch_size"}
    kept = {key: value for key, value in kept.items() if value is not None}
    compared = MethodsOptions(**kept, batch_size=number_or_auto(of_methods["batch_size"]))
    model = StudyModel(name, source, given["model"].how())
    return Cell(model, data, wanted, parse_methods(methods, most) if methods else (), compared)


@cache
def _command(name: str) -> Any:
    from . import app
    from .shown import plain_command

    return plain_command(app).commands[name]


def _values(path: Path, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a command line with these options says, by parameter."""
    command = _command(name)
    known = options_by_name(command)
    words = [word for key, value in options.items() for word in option_words(str(path), known[key], value)]
    values: dict[str, Any] = command.make_context(name, words).params
    return {key: list(value) or None if isinstance(value, tuple) else value for key, value in values.items()}
