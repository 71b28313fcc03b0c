"""A finished run, run again from its `run.json` in another folder, and compared with what lies there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, read_record, read_tensors, sha256_file
from ..model.points import HookedModel
from ..model.provenance import describe_model, is_embedded, versions
from ..run.record import RUN, SUMMARY, RunInfo
from ..run.stages import RunFolder, StageRecord
from .arditi import run

DRAWN = (".html", ".js")
"""Figures and pages: they are drawn from the files that are compared."""
IGNORED = ("versions", "seconds", "peak_mib")
"""Keys that are no results: other versions are said as notes, time and memory are the machine's."""
COMBOS = "combos.json"


@dataclass(frozen=True)
class Reproduction:
    """What running a run again showed."""

    n_files: int
    """That were compared."""
    difference: str | None
    """The first one, in the order in which the stages ran; None: everything matches."""
    notes: tuple[str, ...]
    """What was not the same to begin with: versions, device."""
    not_repeated: tuple[str, ...] = ()
    """Files and folders that lie there and were not compared: combinations, combos, steps that `run.json` omits."""

    @property
    def matches(self) -> bool:
        """Whether every file that was compared holds what it held."""
        return self.difference is None


def read_run(path: Path) -> RunInfo:
    """What a run folder says of its run.

    Raises:
        UserError: there is no run, or its model cannot be loaded again.
    """
    if not (path / RUN).is_file():
        raise UserError(f"{path} is not a run folder: it has no {RUN}")
    held = read_json(path / RUN)
    if isinstance(held, dict) and "recipe" in held:
        raise UserError(f"{path} is a {held['recipe']}; reproduce runs what refusal-mi run made")
    info = read_record(path / RUN, RunInfo)
    if info.model.is_held:
        raise UserError(f"{path} is a run of a model that was held in memory: nothing says how to load it again")
    return info


def reproduce(model: HookedModel, source: str, path: Path, folder: RunFolder) -> Reproduction:
    """Run the run of `path` again in `folder`, and compare every file that its stages wrote, and `summary.json`.

    Tensors must be equal bit for bit, JSON in every value but versions, seconds and memory; figures are not compared.
    Where there is no `summary.json`, as after `run --directions` alone, what both have is compared.

    Args:
        model: from `load_model`, loaded as `read_run(path).model` says.
        source: what was loaded, as `resolve_source` names it.
        folder: an empty one.
    """
    info = read_run(path)
    now = describe_model(model, source)
    changed = {name: version for name, version in versions().items() if info.versions.get(name) != version}
    notes = [f"{name} {info.versions.get(name)} there, {version} here" for name, version in changed.items()]
    notes += [f"device {info.model.device} there, {now.device} here"] if info.model.device != now.device else []
    if info.model.fingerprint != now.fingerprint:
        return Reproduction(0, f"the weights of {now.name} are others than those of the run", tuple(notes))
    run(model, source, info.options, folder)
    before, after = _outputs(path), _outputs(folder.path)
    is_whole = (path / SUMMARY).is_file()
    compared = {file: stage for file, stage in after.items() if is_whole or file in before}
    left = _not_repeated(path, before, after)
    if not compared:
        return Reproduction(0, f"{path} holds no stage of its run", tuple(notes), left)
    n_files = 0
    for file, stage in compared.items():
        n_files += 1
        difference = _difference(path / file, folder.path / file)
        if difference is not None:
            return Reproduction(n_files, f"{file} (stage {stage}): {difference}", tuple(notes), left)
    if is_whole:
        n_files += 1
        held, made = ({**read_json(place / SUMMARY), "model": None} for place in (path, folder.path))
        if (difference := _first_unequal(held, made)) is not None:
            return Reproduction(n_files, f"{SUMMARY}: {difference}", tuple(notes), left)
    return Reproduction(n_files, None, tuple(notes), left)


def _outputs(folder: Path) -> dict[str, str]:
    """File -> stage, in the order in which the stages were done."""
    records = sorted((folder / ".stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    outputs = [(file, record.stem) for record in records for file in read_record(record, StageRecord).outputs]
    return {file: stage for file, stage in outputs if not file.endswith(DRAWN)}


def _not_repeated(path: Path, before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """What stages of the original wrote and the repeat did not; a folder where that is all of it."""
    repeated = {Path(file).parts[0] for file in after}
    left = [file if Path(file).parts[0] in repeated else Path(file).parts[0] for file in before if file not in after]
    return tuple(dict.fromkeys([*left, *([COMBOS] if (path / COMBOS).is_file() else [])]))


def _difference(before: Path, after: Path) -> str | None:
    """The first difference of two files, in words."""
    if not before.is_file():
        return "there is no such file"
    if sha256_file(before) == sha256_file(after):
        return None
    if after.suffix == ".json":
        return _first_unequal(read_json(before), read_json(after))
    return _tensor_difference(read_tensors(before), read_tensors(after))


def _first_unequal(a: Any, b: Any, where: str = "") -> str | None:
    """The first value of JSON that differs, by its place."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            if key in IGNORED:
                continue
            place = f"{where}.{key}" if where else str(key)
            if key not in a or key not in b:
                return f"{place} is {'new' if key in b else 'gone'}"
            if (inner := _first_unequal(a[key], b[key], place)) is not None:
                return inner
        return None
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{where} has {len(a)} entries there, {len(b)} here"
        found = (_first_unequal(x, y, f"{where}[{index}]") for index, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((each for each in found if each is not None), None)
    if a == b or (isinstance(a, str) and isinstance(b, str) and is_embedded(a) and is_embedded(b)):
        return None
    return f"{where} is {a!r} there, {b!r} here"


def _tensor_difference(a: Any, b: Any, where: str = "the tensor") -> str | None:
    """How far tensors are apart; those by name one after the other."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a) != list(b):
            return f"it has the tensors {', '.join(map(str, a))} there, {', '.join(map(str, b))} here"
        found = (_tensor_difference(a[key], b[key], str(key)) for key in a)
        return next((each for each in found if each is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        found = (_tensor_difference(x, y, f"tensor {index}") for index, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((each for each in found if each is not None), None)
    shapes = [(list(getattr(each, "shape", [])), str(getattr(each, "dtype", type(each)))) for each in (a, b)]
    if shapes[0] != shapes[1]:
        return f"{where} is {shapes[0][1]} {shapes[0][0]} there, {shapes[1][1]} {shapes[1][0]} here"
    apart = (a.double() - b.double()).abs().nan_to_num(0.0).max().item()
    equal = bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else bool((a == b).all())
    return None if equal else f"{where} differs by at most {apart:.3g}"
