"""Safetensors checkpoints as files: which tensor lies where, and its bytes; and the new folder beside them."""

import json
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..errors import UserError, cause
from ..files import at_home, clear_leftovers, read_json, read_record, temporary_beside
from ..values import Value

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of a checkpoint that is not quantized."""
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    n_bytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True, eq=False, repr=False)
class ShardIndex(Value):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]
    """Tensor -> the shard that it lies in."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Value):
    """The files of a model directory."""

    directory: Path
    config: Mapping[str, Any]
    """`config.json` as it is."""
    tensors: Mapping[str, StoredTensor]
    """In the order in which they lie in their shards."""
    metadata: Mapping[str, Mapping[str, str]]
    """Shard -> the free-form part of its header."""
    index: ShardIndex | None
    """Where the weights are sharded."""

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(self.metadata)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    def in_shard(self, shard: str) -> list[StoredTensor]:
        """The tensors of one shard, in the order of their bytes."""
        return [tensor for tensor in self.tensors.values() if tensor.shard == shard]

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """One tensor, in memory of its own."""
        stored = self.tensors[name]
        data = bytearray(stored.n_bytes)
        with (self.directory / stored.shard).open("rb") as handle:
            handle.seek(stored.start)
            if handle.readinto(data) != stored.n_bytes:
                raise UserError(f"{self.directory / stored.shard} is cut off: {name} is not complete")
        dtype = DTYPES[stored.dtype]
        return (
            torch.frombuffer(data, dtype=dtype).view(stored.shape) if data else torch.empty(stored.shape, dtype=dtype)
        )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of a local model directory.

    Raises:
        UserError: it has no safetensors weights, is damaged, or is quantized.
    """
    config = read_json(directory / "config.json")
    _check_not_quantized(config, directory)
    # Where there are both, transformers loads the single file.
    is_sharded = not (directory / SINGLE).is_file()
    if is_sharded and not (directory / INDEX).is_file():
        raise UserError(
            f"{directory} holds no {SINGLE} and no {INDEX}: only safetensors weights can be exported or audited"
        )
    index = read_record(directory / INDEX, ShardIndex) if is_sharded else None
    shards = [SINGLE] if index is None else sorted(set(index.weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    metadata = {}
    strays = [shard for shard in shards if Path(shard).name != shard]
    if strays:
        raise UserError(f"{directory / INDEX} names the shard {strays[0]!r}, which is not a file beside it")
    for shard in shards:
        in_shard, metadata[shard] = _read_header(directory / shard)
        tensors |= in_shard
        if index is not None:
            _check_index(index.weight_map, shard, in_shard, directory)
    strange = [tensor for tensor in tensors.values() if tensor.dtype not in DTYPES]
    if strange:
        raise UserError(
            f"{strange[0].name} is stored as {strange[0].dtype}: quantized weights cannot be edited exactly"
        )
    return Checkpoint(directory, config, tensors, metadata, index)


def write_header(handle: Any, tensors: list[StoredTensor], metadata: Mapping[str, str]) -> None:
    """Write the header of a shard whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.n_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    handle.write(struct.pack("<Q", len(text)) + text)


OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt")
_OTHER_INDICES = (".bin.index.json", ".safetensors.index.json")
_OWN = re.compile(r"(README|refusal_mi|UNVERIFIED)((?:\.source)*)(\.md|\.json|)")
"""Files that an export writes itself; those of a source that is an export are kept as `README.source.md` and so on."""


def copy_companions(source: Checkpoint, target: Path) -> list[str]:
    """Copy what lies beside the weights, but no dotfiles and no folders with a dot, which may hold secrets.

    Weights in other formats would be the unedited model and stay behind.

    Returns:
        What was left behind.
    """
    left = []
    for path in sorted(entry for entry in source.directory.rglob("*") if entry.is_file()):
        name = path.relative_to(source.directory)
        is_rewritten = str(name) in source.shards or (str(name) == INDEX and source.index is not None)
        if is_rewritten or any(part.startswith(".") for part in name.parts):
            continue
        if path.name.endswith((*OTHER_WEIGHTS, *_OTHER_INDICES)):
            left.append(str(name))
            continue
        own = _OWN.fullmatch(str(name))
        copy = target / (name if own is None else f"{own[1]}{own[2]}.source{own[3]}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return left


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        metadata = {key: str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
            tensors[name] = StoredTensor(name, path.name, entry["dtype"], shape, 8 + length + start, end - start)
    except (OSError, struct.error, ValueError, MemoryError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {cause(error)}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no safetensors header: {type(error).__name__} {cause(error)}") from None
    last = max((tensor.start + tensor.n_bytes for tensor in tensors.values()), default=8 + length)
    if path.stat().st_size != last:
        raise UserError(f"{path} is {path.stat().st_size} bytes long where its header says {last}: it is not complete")
    return tensors, metadata


def _check_index(
    weight_map: Mapping[str, str], shard: str, tensors: Mapping[str, StoredTensor], directory: Path
) -> None:
    """A tensor that lies where the index does not say would be read from, or edited in, the wrong place."""
    odd = {name for name, place in weight_map.items() if place == shard} ^ set(tensors)
    if odd:
        raise UserError(
            f"{directory / INDEX} and {shard} disagree about {sorted(odd)[0]}: the checkpoint is not complete"
        )


def _check_not_quantized(config: Mapping[str, Any], directory: Path) -> None:
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method")
    if method is None:
        method = "bitsandbytes" if any(key.startswith(("load_in_", "bnb_")) for key in settings) else "unnamed"
    raise UserError(
        f"{directory} is quantized ({method}): projecting quantized weights is not exact, nor is comparing them; use "
        "the unquantized model"
    )


RECORD = "refusal_mi.json"
"""What an export holds beside the weights: how a folder is known that --force may replace."""


@contextmanager
def fresh_directory(out: str | Path, source: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, which takes its name once everything has been written.

    What was there before goes only then.

    Raises:
        UserError: `out` exists and `force` was not given or it is no export, it is a link, it lies in (or around) the
            source, or it cannot be written.
    """
    target = at_home(out).absolute()
    old = target.with_name(f".{target.name}.refusal_mi-old")
    if old.is_dir() and not target.exists():  # an earlier --force was killed between its two renames
        old.rename(target)
    output_path(target, source, force=force)
    clear_leftovers(target.parent, target.name)
    temporary = temporary_beside(target, uuid4().hex[:8])
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _rename(temporary, target, old)
    except OSError as error:
        if error.errno is None:  # not from the file system
            raise
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def output_path(out: str | Path, source: Path, *, force: bool) -> Path:
    """The absolute output path, if it may be written."""
    target = at_home(out).absolute()
    place, origin = target.resolve(), source.resolve()
    if place == origin or place in origin.parents or origin in place.parents:
        raise UserError(f"{target} is the source, or one lies in the other; choose an --output-dir beside it")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise UserError(f"{target} is (or contains) the folder you are in; choose another --output-dir")
    if target.is_symlink():
        raise UserError(f"{target} is a link, which an export does not follow; choose another --output-dir")
    if not target.exists():
        return target
    is_export = (target / RECORD).is_file()
    if not is_export and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} is no export of this program (it has no {RECORD}) and is not replaced; choose another "
            "--output-dir"
        )
    if not force:
        raise UserError(f"{target} exists; choose another --output-dir, or replace it with --force")
    return target


def _rename(temporary: Path, target: Path, old: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    if old.exists():  # an earlier --force was killed after them
        shutil.rmtree(old)
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)
