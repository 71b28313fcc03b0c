"""A run folder whose stages are written whole, remember what they were computed from, and are not done twice."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import as_json, clear_leftovers, read_record, sha256_file, sha256_json, write_json, write_record
from ..model.provenance import ModelRecord, fingerprint, is_told_by_files
from ..values import Value

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SIGNED = "model.json"
"""The model that a folder is about where no recipe wrote a `run.json`."""
_HELD: set[Path] = set()
"""Locks of this process, which may have several objects for one folder."""


@dataclass(frozen=True, eq=False, repr=False)
class StageRecord(Value):
    """`.stages/{name}.json`: a finished stage."""

    key: str
    """Hash of the inputs."""
    inputs: Mapping[str, Any]
    """Everything that it was computed from; "files" names outputs of earlier stages by hash."""
    outputs: Mapping[str, str]
    """Path -> SHA-256."""
    seconds: float
    peak_mib: float | None = None
    """Most memory that the process held until its end; None where the system does not say."""


@dataclass(frozen=True)
class Origin:
    """What a folder says of the model that it is about."""

    source: str
    revision: str | None = None
    fingerprint: str | None = None

    def is_at(self, source: str) -> bool:
        """Whether it is the model of this name, or its very files lie there: models and packages are moved."""
        if self.source == source or not is_told_by_files(source, self.fingerprint):
            return self.source == source
        return fingerprint(Path(source)) == self.fingerprint


@dataclass(frozen=True)
class _Run:
    """What every recipe's `run.json` says."""

    model: Origin


@dataclass
class RunFolder:
    """A folder of artifacts about one model; `.stages/` holds one record per finished stage."""

    path: Path
    fresh: bool = False
    """Compute every stage again."""
    report: Callable[[str], None] = field(default=lambda _: None)
    """Told what happens, one line at a time."""

    def check_writable(self) -> None:
        """Make sure that this folder can be written, before anything is computed for it.

        Raises:
            UserError: it, or the first folder above it that exists, is no folder or may not be written.
        """
        place = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reason = (
                "may not be written; allow it" if place.is_dir() else "is not a folder; choose another --output-dir"
            )
            raise UserError(f"cannot write to {self.path}: {place} {reason}")

    def claim(self, model: ModelRecord) -> None:
        """Make sure that this folder is new or about this model.

        Raises:
            UserError: its `run.json` or `model.json` names another model or revision, or another process works in it.
        """
        if os.access(self._records, os.W_OK):  # a folder that is only read needs neither
            with self.locked():
                clear_leftovers(self.path, deep=True)
        before = self._model()
        is_moved = before is not None and before.fingerprint == model.fingerprint
        if before is None or (is_moved and is_told_by_files(model.source, model.fingerprint)):
            return
        for key in ("source", "revision"):
            if getattr(before, key) != getattr(model, key):
                raise UserError(
                    f"{self.path} holds a run of {before.source} (revision {before.revision}), not of "
                    f"{model.source} (revision {model.revision}); choose another --output-dir"
                )

    def sign(self, model: ModelRecord) -> None:
        """Claim this folder, and write the model into it for those who come after: `model.json`.

        Raises:
            UserError: as `claim`.
        """
        self.claim(model)
        write_record(self.path / SIGNED, {"model": model})

    def check_weights(self, model: ModelRecord) -> None:
        """Make sure that what lies in this folder was computed from these very weights, before it is used.

        Raises:
            UserError: its `run.json` names another model or revision, or other contents of the same directory.
        """
        self.claim(model)
        before = self._model()
        if before is not None and before.fingerprint not in (None, model.fingerprint):
            raise UserError(
                f"{self.path} was computed from other weights: {model.source} has changed since; make it again"
            )

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        compute: Callable[[], None],
        *,
        about: str = "",
        seconds_elsewhere: float = 0.0,
    ) -> dict[str, str]:
        """Run `compute`, which must write `outputs`, unless they are there and came from the same `inputs`.

        Args:
            name: file name of the record.
            inputs: everything that the outputs depend on, as JSON values.
            outputs: paths relative to the folder.
            about: how much work it is, for the progress line.
            seconds_elsewhere: what it took before, in another process.

        Returns:
            The SHA-256 of every output: what a later stage names among its inputs.
        """
        with self.locked():
            return self._stage(name, inputs, outputs, compute, about, seconds_elsewhere)

    def done(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, str] | None:
        """The SHA-256 of every output of a stage that needs not run again; None where it does."""
        if self.fresh:
            return None
        record = self._records / f"{name}.json"
        done = self._done(record, inputs, outputs)
        if done is None and self._bring_back(name, sha256_json(inputs)):
            done = self._done(record, inputs, outputs)
        return done

    def is_done(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> bool:
        """Whether `stage` would keep what is there; takes no lock and writes nothing."""
        return self._done(self._records / f"{name}.json", inputs, outputs) is not None

    def forget(self, name: str) -> None:
        """Let a stage run again, whatever it was computed from; its outputs stay."""
        for record in (self._records / f"{name}.json", *self._aside("*").parent.glob(f"*/{name}.json")):
            record.unlink(missing_ok=True)

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        compute: Callable[[], None],
        about: str,
        seconds_elsewhere: float,
    ) -> dict[str, str]:
        record, key = self._records / f"{name}.json", sha256_json(inputs)
        done = self.done(name, inputs, outputs)
        if done is not None:
            self.report(f"{name}: done before, kept")
            return done
        self.report(f"{name}{f': {about}' if about else ''}")
        record.unlink(missing_ok=True)
        start = time.perf_counter()
        compute()
        hashes = self._hashes(outputs)
        missing = [output for output in outputs if output not in hashes]
        if missing:
            raise RuntimeError(f"stage {name} did not write {missing[0]}")
        seconds = round(time.perf_counter() - start + seconds_elsewhere, 3)
        write_json(record, StageRecord(key, dict(inputs), hashes, seconds, _peak_mib()))
        return hashes

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the system takes the lock from a process that dies.

        Raises:
            UserError: another process has it.
        """
        place = self._records / "lock"
        if fcntl is None or place.resolve() in _HELD:
            yield
            return
        missing = [each for each in (place.parent, *place.parent.absolute().parents) if not each.exists()]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.open("a")
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is at work in {self.path}: wait for it, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                yield
                return
            _HELD.add(place.resolve())
            try:
                yield
            finally:
                _HELD.discard(place.resolve())
                if missing and not any(each != place for each in place.parent.iterdir()):  # nothing came of it
                    place.unlink()
                    for folder in missing:
                        with suppress(OSError):
                            folder.rmdir()

    def seconds(self) -> dict[str, float]:
        """How long each finished stage took."""
        return {name: record.seconds for name, record in self._done_stages().items()}

    def before(self, name: str) -> Mapping[str, Any]:
        """The inputs that a stage was last computed from; empty if it never was."""
        record = self._records / f"{name}.json"
        return read_record(record, StageRecord).inputs if record.exists() else {}

    def peak_mib(self) -> float | None:
        """The most memory (MiB) that a finished stage's process held until its end."""
        return max((record.peak_mib for record in self._done_stages().values() if record.peak_mib), default=None)

    def set_aside(self, file: str) -> None:
        """Move a file that no longer holds, and what was computed from it, directly or not, to `.stages/set_aside/`.

        A stage that is asked for again with the inputs that it had takes its outputs from there.
        """
        names = self._computed_from(file)
        for name in names:
            record = self._records / f"{name}.json"
            before = read_record(record, StageRecord)
            aside = self._aside(before.key)
            write_json(aside / record.name, before)
            for output in before.outputs:
                _move(self.path / output, aside / "outputs" / output)
            record.unlink()
        if names:
            self.report(f"set aside: {len(names)} stages of {file}, which no longer holds")

    def _model(self) -> Origin | None:
        """The model of the run that lies here."""
        records = (self.path / name for name in ("run.json", SIGNED))
        return next((read_record(record, _Run).model for record in records if record.exists()), None)

    def _done_stages(self) -> dict[str, StageRecord]:
        return {path.stem: read_record(path, StageRecord) for path in sorted(self._records.glob("*.json"))}

    @property
    def _records(self) -> Path:
        return self.path / ".stages"

    def _aside(self, key: str) -> Path:
        return self._records / "set_aside" / key

    def _computed_from(self, file: str) -> list[str]:
        """Names of the stages that wrote this file, or name it or an output of such a stage among their input files."""
        records = self._done_stages()
        names = [name for name, record in records.items() if file in record.outputs]
        gone = {file, *(output for name in names for output in records[name].outputs)}
        while new := [
            name for name, record in records.items() if name not in names and gone & set(record.inputs.get("files", ()))
        ]:
            names += new
            gone |= {output for name in new for output in records[name].outputs}
        return names

    def _bring_back(self, name: str, key: str) -> bool:
        """Put the outputs and the record of a stage that was set aside back, if it had these inputs."""
        aside = self._aside(key) / f"{name}.json"
        if not aside.is_file():
            return False
        before = read_record(aside, StageRecord)
        for output in before.outputs:
            _move(aside.parent / "outputs" / output, self.path / output)
        write_json(self._records / f"{name}.json", before)
        aside.unlink()
        return True

    def _done(self, record: Path, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, str] | None:
        """The hashes of a stage's outputs, if it was done from these inputs and they are as it left them."""
        if not record.exists():
            return None
        before = read_record(record, StageRecord)
        return dict(before.outputs) if _is_same(before, inputs) and self._hashes(outputs) == before.outputs else None

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        return {output: sha256_file(self.path / output) for output in outputs if (self.path / output).is_file()}


def _is_same(before: StageRecord, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage was computed from these inputs; where a model lies is none of them if its files tell it."""
    if before.key == sha256_json(inputs):
        return True
    given, model = before.inputs.get("model"), as_json(inputs.get("model"))
    if not isinstance(given, dict) or not isinstance(model, dict) or "source" not in model:
        return False
    if not is_told_by_files(model["source"], model.get("fingerprint")):
        return False
    moved = {**before.inputs, "model": {**given, "source": model["source"]}}
    return sha256_json(moved) == sha256_json(inputs)


def _peak_mib() -> float | None:
    """The most memory (MiB) that this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10, 1)


def _move(source: Path, target: Path) -> None:
    """Move a file that is there, over any other."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
