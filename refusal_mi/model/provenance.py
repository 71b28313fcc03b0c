"""What a run was computed from: package versions and the identity of a model."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .loading import ORGANISM
from .points import HookedModel, model_revision, model_type

_PACKAGES = ("refusal_mi", "torch", "transformers", "transformer-lens", "datasets", "tokenizers", "numpy")
_WHOLE_FILE = 64 * 2**20
_EDGE = 2**20


def versions() -> dict[str, str]:
    """Version of Python and of every package that can change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_model(model: HookedModel, source: str) -> dict[str, Any]:
    """Which model this is: source, hub commit or fingerprint of the directory, shape, dtype, device."""
    local = Path(source).is_dir()
    return {
        "source": source,
        "revision": model_revision(model),
        "fingerprint": fingerprint(Path(source)) if local else None,
        "model_type": model_type(model),
        "n_layers": model.cfg.n_layers,
        "d_model": model.cfg.d_model,
        "d_vocab": model.cfg.d_vocab,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(model.cfg.device),
    }


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
