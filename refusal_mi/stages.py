"""A run folder whose stages are written whole, remember what they were computed from, and are not done twice."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, sha256_file, sha256_json, write_json


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
            reason = "may not be written" if place.is_dir() else "is not a folder"
            raise UserError(f"cannot write to {self.path}: {place} {reason}; choose another --output-dir")

    def claim(self, model: Mapping[str, Any]) -> None:
        """Make sure that this folder is new or about this model.

        Raises:
            UserError: its `run.json` names another model or revision.
        """
        record = self.path / "run.json"
        if not record.exists():
            return
        before = read_json(record).get("model", {})
        for key in ("source", "revision"):
            if before.get(key) != model.get(key):
                raise UserError(
                    f"{self.path} holds a run of {before.get('source')} (revision {before.get('revision')}), not of "
                    f"{model.get('source')} (revision {model.get('revision')}); choose another --output-dir"
                )

    def check_weights(self, model: Mapping[str, Any]) -> None:
        """Make sure that what lies in this folder was computed from these very weights, before it is used.

        Raises:
            UserError: its `run.json` names another model or revision, or other contents of the same directory.
        """
        self.claim(model)
        record = self.path / "run.json"
        before = read_json(record)["model"].get("fingerprint") if record.exists() else None
        if before is not None and before != model.get("fingerprint"):
            raise UserError(
                f"{self.path} was computed from other weights: {model.get('source')} has changed since; make it again"
            )

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        compute: Callable[[], None],
        *,
        about: str = "",
    ) -> dict[str, str]:
        """Run `compute`, which must write `outputs`, unless they are there and came from the same `inputs`.

        Args:
            name: file name of the record.
            inputs: everything that the outputs depend on, as JSON values.
            outputs: paths relative to the folder.
            about: how much work it is, for the progress line.

        Returns:
            The SHA-256 of every output: what a later stage names among its inputs.
        """
        record, key = self.path / ".stages" / f"{name}.json", sha256_json(inputs)
        if not self.fresh and record.exists():
            before = read_json(record)
            if before["key"] == key and self._hashes(outputs) == before["outputs"]:
                self.report(f"{name}: done before, kept")
                return before["outputs"]
        self.report(f"{name}{f': {about}' if about else ''}")
        record.unlink(missing_ok=True)
        start = time.perf_counter()
        compute()
        hashes = self._hashes(outputs)
        missing = [output for output in outputs if output not in hashes]
        if missing:
            raise RuntimeError(f"stage {name} did not write {missing[0]}")
        seconds = round(time.perf_counter() - start, 3)
        write_json(record, {"key": key, "inputs": dict(inputs), "outputs": hashes, "seconds": seconds})
        return hashes

    def seconds(self) -> dict[str, float]:
        """How long each finished stage took."""
        return {record.stem: read_json(record)["seconds"] for record in sorted((self.path / ".stages").glob("*.json"))}

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        return {output: sha256_file(self.path / output) for output in outputs if (self.path / output).is_file()}
