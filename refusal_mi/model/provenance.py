"""What a run was computed from: package versions and the identity of a model."""

import hashlib
import platform
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import at_home
from .loading import ORGANISM, hub_commit
from .points import (
    HookedModel,
    bridge,
    is_from_files,
    is_split,
    model_revision,
    model_source,
    model_type,
    quantization_of,
    ran_remote_code,
)

_PACKAGES = ("refusal_mi", "torch", "transformers", "transformer-lens", "datasets", "tokenizers", "numpy")
_WHOLE_FILE = 64 * 2**20
_EDGE = 2**20
_HELD = "held:"


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
    """Of a directory or file; of the parameters, after "held:", where the model was given as an object."""
    model_type: str
    n_layers: int
    d_model: int
    d_vocab: int
    dtype: str
    device: str
    quantization: str | None = None
    """As --quantization names it, or the method that the checkpoint's config names."""
    is_split: bool = False
    """Over several devices, by a device map."""
    remote_code: bool = False
    """Whether Python files that came with the checkpoint ran (--trust-remote-code)."""

    @property
    def is_held(self) -> bool:
        """Whether the model was given as an object, which may hold other weights than `source`."""
        return (self.fingerprint or "").startswith(_HELD)

    @property
    def name(self) -> str:
        """The model as people call it."""
        return display_name(self.source)


def describe_model(model: HookedModel, source: str) -> ModelRecord:
    """Source, hub commit or fingerprint of the files, shape, dtype and device of a model, and how it was loaded."""
    return ModelRecord(
        source,
        model_revision(model),
        _fingerprint(model, source),
        model_type(model),
        model.cfg.n_layers,
        model.cfg.d_model,
        model.cfg.d_vocab,
        str(model.cfg.dtype).removeprefix("torch."),
        str(model.cfg.device),
        quantization_of(model),
        is_split(model),
        ran_remote_code(model),
    )


def _fingerprint(model: HookedModel, source: str) -> str | None:
    if not is_from_files(model):
        return _HELD + parameters_fingerprint(model)
    return fingerprint(Path(source)) if Path(source).exists() else None


def check_same_weights(made: ModelRecord, model: HookedModel, where: str) -> None:
    """Make sure that a model holds the weights that something was computed from.

    A model in memory and one by name cannot be told apart, nor can a directory and a hub id.

    Args:
        made: the record of the model that it was computed from.
        where: what it is called, in the error.

    Raises:
        UserError: the files, the parameters in memory, or the hub's commit are others.
    """
    source = model_source(model)
    sizes = (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab)
    if sizes != (made.n_layers, made.d_model, made.d_vocab):
        raise UserError(
            f"{where} was computed from a model of {made.n_layers} layers, {made.d_model} wide, {made.d_vocab} tokens "
            f"({made.name}), and {source} has {sizes[0]}, {sizes[1]}, {sizes[2]}: load that model, or make a run of "
            "this one"
        )
    if made.is_held == is_from_files(model):
        return
    there, here = made.fingerprint, _fingerprint(model, source)
    if there is None and here is None:
        there, here = made.revision, model_revision(model)
    if None not in (there, here) and there != here:
        raise UserError(
            f"{where} was computed from other weights, {made.name} ({_short(there)}), than those of {source} "
            f"({_short(here)}): load that model, or make a run of this one"
        )


def _short(name: str | None) -> str:
    return (name or "").removeprefix(_HELD)[:12]


def parameters_fingerprint(model: HookedModel) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, offloaded ones too."""
    from accelerate.utils import align_module_device

    digest = hashlib.sha256()
    for path, module in bridge(model).original_model.named_modules():
        with align_module_device(module):
            parts = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in parts:
                digest.update(f"{path}.{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                flat = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1)
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_origin(
    provenances: Iterable[Mapping[str, Any]], source: str, revision: str | None = None, *, allowed: bool = False
) -> None:
    """Refuse directions that were read in other weights than those that they are used on.

    Args:
        provenances: of the directions; what does not name its model is not refused. A folder cannot be told from a
            hub id: a warning says so.
        source: directory or hub id of the model that they are used on.
        allowed: whether another model is meant.

    Raises:
        UserError: the directory has other contents, or it is another hub id or commit.
    """
    named = [each for each in map(_origin, provenances) if each is not None]
    if allowed or not named:
        return
    is_local = Path(source).exists()
    here = fingerprint(Path(source)) if is_local else hub_commit(source, revision)
    for made in named:
        there = made.get("fingerprint") if is_local else made.get("revision")
        if str(made.get("fingerprint")).startswith(_HELD):
            warnings.warn(
                f"this direction was read in a model in memory, made of {made['source']}: is it {source}, unedited?",
                stacklevel=2,
            )
            continue
        is_same_kind = bool(made.get("fingerprint")) == is_local
        is_other_id = not is_local and made["source"] != source
        if not is_same_kind and made["source"] != source:
            warnings.warn(f"this direction was read in {made['source']}; is that {source}?", stacklevel=2)
        if is_same_kind and (is_other_id or (None not in (here, there) and here != there)):
            then, now = (str(each or "unknown")[:12] for each in (there, here))
            where = f"in {made['source']} ({then}), not in {source} ({now})"
            if made["source"] == source:
                where = f"in other weights: {source} has changed since (from {then} to {now})"
            raise UserError(
                f"this direction was read {where}: use it there, make one of this model, or say --allow-other-model"
            )


def _origin(provenance: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Source, revision and fingerprint of the model that a direction was read in, where its metadata name one."""
    model = provenance.get("model")
    if isinstance(model, str):
        return {**provenance, "source": model}
    return model if isinstance(model, Mapping) and isinstance(model.get("source"), str) else None


def is_embedded(source: str) -> bool:
    """Whether this is the model of the package, wherever the package was installed when the record was made."""
    return Path(source).parts[-3:] == ORGANISM.parts[-3:]


def display_name(source: str) -> str:
    """A model as people call it: the hub id, or the last part of a directory."""
    if is_embedded(source):
        return "the embedded model"
    return Path(source).name if Path(source).is_absolute() else source


def identify_source(source: str) -> dict[str, str]:
    """What a directory holds now, or which commit of the hub was loaded, for records of what depends on it."""
    path = at_home(source)
    if path.exists():
        return {"fingerprint": fingerprint(path)}
    commit = hub_commit(source, None)
    return {} if commit is None else {"revision": commit}


def fingerprint(source: Path) -> str:
    """SHA-256 over the names, sizes and contents of a model's file or directory of files, model cards (*.md) left out.

    Of a file over 64 MiB the first and last MiB and its modification time stand for the contents.
    """
    digest = hashlib.sha256()
    for path in _files(source):
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


def is_told_by_files(source: str, fingerprint: str | None) -> bool:
    """Whether a fingerprint is one of all contents of the files that lie there, so that it tells the model anywhere.

    That of parameters in memory leaves the config out, that of files over 64 MiB trusts their times of change.
    """
    if fingerprint is None or fingerprint.startswith(_HELD) or not Path(source).exists():
        return False
    return all(path.stat().st_size <= _WHOLE_FILE for path in _files(Path(source)))


def _files(source: Path) -> list[Path]:
    files = [source] if source.is_file() else [each for each in source.iterdir() if each.is_file()]
    return sorted(each for each in files if each.suffix != ".md")
