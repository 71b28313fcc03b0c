"""What a run was computed from: package versions and the identity of a model."""

import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .loading import ORGANISM
from .points import HookedModel, model_revision, model_type

_PACKAGES = ("refusal_mi", "torch", "transformers", "transformer-lens", "datasets", "tokenizers", "numpy")
_WHOLE_FILE = 64 * 2**20
_EDGE = 2**20


def versions() -> dict[str, str]:
    """Version of Python and of every package that can change a number."""
    return {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class ModelRecord:
    """Which model something was computed from."""

    source: str
    """Directory or hub id."""
    revision: str | None
    """Hub commit."""
    fingerprint: str | None
    """Of a directory."""
    model_type: str
    n_layers: int
    d_model: int
    d_vocab: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        """The model as people call it."""
        return display_name(self.source)


def describe_model(model: HookedModel, source: str) -> ModelRecord:
    """Source, hub commit or fingerprint of the directory, shape, dtype and device of a model."""
    return ModelRecord(
        source,
        model_revision(model),
        fingerprint(Path(source)) if Path(source).is_dir() else None,
        model_type(model),
        model.cfg.n_layers,
        model.cfg.d_model,
        model.cfg.d_vocab,
        str(model.cfg.dtype).removeprefix("torch."),
        str(model.cfg.device),
    )


def is_embedded(source: str) -> bool:
    """Whether this is the model of the package, wherever the package was installed when the record was made."""
    return Path(source).parts[-3:] == ORGANISM.parts[-3:]


def display_name(source: str) -> str:
    """A model as people call it: the hub id, or the last part of a directory."""
    if is_embedded(source):
        return "the embedded model"
    return Path(source).name if Path(source).is_absolute() else source


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names, sizes and contents of a model directory's files, model cards (*.md) left out.

    Of a file over 64 MiB the first and last MiB and its modification time stand for the contents.
    """
    digest = hashlib.sha256()
    for path in sorted(entry for entry in directory.iterdir() if entry.is_file() and entry.suffix != ".md"):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0".encode())
        with path.open("rb") as handle:
            if status.st_size <= _WHOLE_FILE:
                digest.update(handle.read())
            else:
                digest.update(handle.read(_EDGE))
                handle.seek(-_EDGE, 2)
                digest.update(handle.read(_EDGE))
                digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()
