"""Writing an edited checkpoint shard by shard: one tensor in memory, untouched bytes copied."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any, Literal

import torch

from ..files import sha256_file, write_json, write_text
from ..values import Value
from ..weights import EditFigures, TensorEdit, edit_
from .checkpoint import DTYPES, FLOATS, INDEX, Checkpoint, StoredTensor, write_header

ExportDtype = Literal["keep", "float32", "bfloat16"]
_BLOCK = 2**24
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Head:
    """An unembedding that gets a tensor of its own: a copy of the unedited token embedding."""

    name: str
    source: str


@dataclass(frozen=True)
class ShardHashes:
    """SHA-256 of one file of weights before and after; equal where nothing was edited, None where there is none."""

    source: str | None
    export: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Rewritten(Value):
    """What was written."""

    figures: Mapping[str, EditFigures]
    hashes: Mapping[str, ShardHashes]


def rewrite(
    source: Checkpoint,
    target: Path,
    edits: Mapping[str, TensorEdit],
    *,
    head: Head | None = None,
    dtype: ExportDtype = "keep",
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Rewritten:
    """Write every shard of `source` into `target` with `edits` made, and its index.

    Args:
        head: saved beside the token embedding, in the same shard.
        dtype: of every floating-point tensor.
        advance: told how many bytes of the source have been dealt with.
    """
    figures: dict[str, EditFigures] = {}
    hashes = {}
    for shard in source.shards:
        old = source.in_shard(shard)
        new = [_converted(tensor, dtype) for tensor in old]
        if head is not None and source.tensors[head.source].shard == shard:
            old.append(source.tensors[head.source])
            new.append(replace(_converted(old[-1], dtype), name=head.name))
        is_untouched = new == old and not any(tensor.name in edits for tensor in old)
        with (target / shard).open("wb") as raw:
            handle = _Hashed(raw)
            if is_untouched:
                before = _copy_file(source.directory / shard, handle, advance)
            else:
                write_header(handle, new, source.metadata[shard])
                for stored, converted in zip(old, new, strict=True):
                    edit = edits.get(converted.name)
                    if edit is None and converted.dtype == stored.dtype:
                        _copy_bytes(source, stored, handle)
                    else:
                        _write_edited(source, stored, converted, edit, handle, figures)
                    advance(stored.n_bytes if converted.name == stored.name else 0)
                before = sha256_file(source.directory / shard)
        hashes[shard] = ShardHashes(before, handle.digest.hexdigest())
    missed = set(edits) - set(figures)
    if missed:
        raise AssertionError(f"{sorted(missed)[0]} was to be edited and is not in the checkpoint")
    if source.index is not None:
        _write_index(source, target, head, dtype)
    return Rewritten(figures, hashes)


def write_config(source: Checkpoint, target: Path, *, is_untied: bool, dtype: ExportDtype) -> None:
    """Change what must change in `config.json`: the tie of the embeddings, and the dtype."""
    config = dict(source.config)
    if is_untied:
        config["tie_word_embeddings"] = False
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = text | {"tie_word_embeddings": False}
    if dtype != "keep":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if config != source.config:
        write_json(target / "config.json", config)


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.digest = handle, hashlib.sha256()

    def write(self, data: Any) -> None:
        self.digest.update(data)
        self.handle.write(data)


def _write_edited(
    source: Checkpoint,
    stored: StoredTensor,
    converted: StoredTensor,
    edit: TensorEdit | None,
    handle: _Hashed,
    figures: dict[str, EditFigures],
) -> None:
    tensor = source.read(stored.name).to(DTYPES[converted.dtype])
    if edit is not None:
        figures[converted.name] = edit_(tensor, edit)
    handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _converted(tensor: StoredTensor, dtype: ExportDtype) -> StoredTensor:
    if dtype == "keep" or not tensor.is_float:
        return tensor
    name = next(key for key, value in FLOATS.items() if value == dtype)
    return replace(tensor, dtype=name, n_bytes=prod(tensor.shape) * DTYPES[name].itemsize)


def _blocks(path: Path, start: int, n_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as handle:
        handle.seek(start)
        while n_bytes:
            block = handle.read(min(_BLOCK, n_bytes))
            if not block:
                raise OSError(f"{path} ended {n_bytes} bytes early")
            n_bytes -= len(block)
            yield block


def _copy_bytes(source: Checkpoint, tensor: StoredTensor, handle: _Hashed) -> None:
    for block in _blocks(source.directory / tensor.shard, tensor.start, tensor.n_bytes):
        handle.write(block)


def _copy_file(path: Path, handle: _Hashed, advance: Callable[[int], None]) -> str:
    """Copy a shard whole; a link would let a later in-place save corrupt the source."""
    for block in _blocks(path, 0, path.stat().st_size):
        handle.write(block)
        advance(len(block))
    return handle.digest.hexdigest()


def _write_index(source: Checkpoint, target: Path, head: Head | None, dtype: ExportDtype) -> None:
    assert source.index is not None
    names, metadata = dict(source.index.weight_map), dict(source.index.metadata)
    total = sum(_converted(tensor, dtype).n_bytes for tensor in source.tensors.values())
    if head is not None:
        names[head.name] = names[head.source]
        total += _converted(source.tensors[head.source], dtype).n_bytes
    if head is not None or dtype != "keep":
        metadata["total_size"] = total
    if head is not None:
        metadata.pop("total_parameters", None)
    text = json.dumps({"metadata": metadata, "weight_map": names}, indent=2) + "\n"
    write_text(target / INDEX, text)


@contextmanager
def byte_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr, silent where nobody is looking."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # A bar that vanishes leaves an empty output in a notebook.
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n_bytes: progress.advance(task, n_bytes)
