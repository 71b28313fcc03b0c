"""Reading and writing: whatever lies under its final name is complete."""

import contextlib
import glob
import hashlib
import io
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .errors import UserError, cause

if TYPE_CHECKING:
    from pydantic import ValidationError
    from torch import Tensor

FORMAT = 1
"""Of the records that this version writes (docs/run-folder.md)."""
Record = TypeVar("Record")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary sibling of `path`, then rename it: a killed write leaves nothing behind.

    Raises:
        UserError: the place cannot be written.
    """
    clear_leftovers(path.parent, path.name)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path, *more: str) -> Path:
    """A hidden name beside a path, which says whose it is."""
    return path.with_name(".".join(["", path.name, f"{platform.node()}-{os.getpid()}", *more, "tmp"]))


def clear_leftovers(folder: Path, name: str = "", *, deep: bool = False) -> None:
    """Remove what killed processes of this machine left behind under the names of `temporary_beside`.

    Args:
        name: of one file or folder; all by default.
        deep: in the folders below as well.
    """
    pattern = f".{glob.escape(name) if name else '*'}.*.tmp"
    whose = re.compile(rf"\.{re.escape(platform.node())}-(\d{{1,9}})(?:\.[0-9a-f]{{8}})?\.tmp$")
    for left in [*(folder.rglob if deep else folder.glob)(pattern)]:
        match = whose.search(left.name)
        if match is None or is_alive(int(match[1])):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; where that cannot be asked, it does."""
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def at_home(path: str | Path) -> Path:
    """The path with ~ and ~user written out.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: there is no home folder of that name; write the path out, or begin it with ./"
        ) from None


def check_not_input(output: Path, inputs: Iterable[Path]) -> None:
    """Make sure that a new file takes the place of nothing that it is made from.

    Raises:
        UserError: it is one of the inputs, or replaces a file in a folder among them.
    """
    there = output.resolve()
    for each in inputs:
        if each.resolve() == there or (output.exists() and each.resolve() in there.parents):
            raise UserError(f"{output} would be written over, and {each} is read: choose another place for what is new")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented as the published artifacts are; NaN and infinity are an error (write None).

    Records inside `value` are written as `as_json` says.
    """
    write_text(path, json.dumps(as_json(value), indent=4, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, value: Any) -> None:
    """`torch.save` a tensor, or a list or dict of them, each in a CPU storage of its own; equal ones, equal bytes."""
    import torch

    def own(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.detach().cpu().clone().contiguous()
        if isinstance(item, dict):
            return {key: own(entry) for key, entry in item.items()}
        return [own(entry) for entry in item]

    write_saved(path, own(value))


def write_vector(path: Path, vector: "Tensor") -> None:
    """Write one tensor as its name ends: `.pt`, `.safetensors` or `.npy`.

    Raises:
        UserError: it ends otherwise, or the place cannot be written.
    """
    own = vector.detach().cpu().clone().contiguous()
    if path.suffix == ".safetensors":
        import safetensors.torch

        data = safetensors.torch.save({"direction": own})
        write_whole(path, lambda temporary: temporary.write_bytes(data))
    elif path.suffix == ".npy":
        import numpy

        saved = io.BytesIO()
        numpy.save(saved, own.float().numpy() if own.element_size() < 4 else own.numpy())
        write_whole(path, lambda temporary: temporary.write_bytes(saved.getbuffer()))
    elif path.suffix == ".pt":
        write_tensors(path, own)
    else:
        raise UserError(f"a vector is saved as .pt, .safetensors or .npy, not as {path.name}")


def write_saved(path: Path, value: Any) -> None:
    """`torch.save`; its archive is not named after the file, so that equal values are equal bytes."""
    import torch

    saved = io.BytesIO()
    torch.save(value, saved)
    write_whole(path, lambda temporary: temporary.write_bytes(saved.getbuffer()))


def read_json(path: Path) -> Any:
    """Read JSON; bare NaN, as in published score files, becomes a float NaN.

    Raises:
        UserError: the file does not exist, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def as_json(value: Any) -> Any:
    """JSON values of a record: what its `describe()` says, or the fields of a dataclass, all the way down."""
    if callable(describe := getattr(value, "describe", None)):
        return as_json(describe())
    if is_dataclass(value):
        return {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON, with the format's number."""
    write_json(path, {"format": FORMAT, **as_json(record)})


@overload
def read_record(path: Path, kind: type[Record]) -> Record: ...
@overload
def read_record(path: Path, kind: Any) -> Any: ...
def read_record(path: Path, kind: Any) -> Any:
    """Read JSON into a dataclass, or into a list or dict of them; keys that the type does not name are passed over.

    Raises:
        UserError: the file does not exist, is not JSON, is of a newer format, or does not hold what it should.
    """
    from pydantic import TypeAdapter, ValidationError

    content = read_json(path)
    number = content.get("format", FORMAT) if isinstance(content, dict) else FORMAT
    if number != FORMAT:
        raise UserError(f"{path} is of format {number!r}, and this version of refusal_mi reads format {FORMAT}")
    try:
        return TypeAdapter(kind).validate_json(Path(path).read_bytes(), strict=True)
    except ValidationError as error:
        raise UserError(
            f"{path} is damaged, or of another version of refusal_mi: {_first_of(error)}; make it again"
        ) from None


def checked(kind: Any, value: Any) -> Any:
    """A JSON value as a type says it, lists as its tuples.

    Raises:
        ValueError: it does not hold what the type says.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_first_of(error)) from None


def parsed(parse: Callable[[Any], Any]) -> Any:
    """For an annotation: the field is read by a function of its JSON value, of a form that the type does not say."""
    from pydantic import PlainValidator

    def read(value: Any) -> Any:
        try:
            return parse(value)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"not of the expected form ({type(error).__name__}: {cause(error)})") from None

    return PlainValidator(read)


def with_values(kind: type, values: Mapping[str, Any]) -> Any:
    """For an annotation: a dataclass that is read with these values where the file, an older one, has none."""
    return parsed(lambda value: checked(kind, {**values, **value}))


def _first_of(error: "ValidationError") -> str:
    """The first thing that is wrong, in a line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def read_tensors(path: Path) -> Any:
    """Read a file of plain tensors onto the CPU, wherever it was saved: `.safetensors`, `.npy`, `.npz`, else `.pt`.

    Of a control vector of llama.cpp (`.gguf`), the vectors by TransformerLens' names for where they are added.

    Raises:
        UserError: the file does not exist, cannot be read, or holds something other than tensors.
    """
    if (read := _OTHER_TENSORS.get(Path(path).suffix)) is not None:
        try:
            return read(path)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"no such file: {path}") from None
        except Exception as error:  # foreign code
            raise UserError(f"{path} is no {Path(path).suffix} file of plain tensors: {cause(error)}") from None
    return _read_saved(path)


def _read_safetensors(path: Path) -> Any:
    import safetensors.torch

    return safetensors.torch.load(Path(path).read_bytes())


def _read_numpy(path: Path) -> Any:
    import numpy
    import torch

    held = numpy.load(path, allow_pickle=False)
    if isinstance(held, numpy.ndarray):
        return torch.from_numpy(held)
    with held:
        return {name: torch.from_numpy(held[name]) for name in held.files}


def _read_gguf(path: Path) -> Any:
    """llama.cpp's `direction.{block}` is added to what that block puts out."""
    import torch

    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise UserError("control vectors need the gguf library: pip install 'refusal_mi[export]'") from None
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    reader = GGUFReader(path)
    kind = reader.get_field("general.architecture")
    if kind is None or kind.contents() != "controlvector":
        raise UserError(f"{path} is a GGUF file of {kind and kind.contents()!r}, not of a control vector")
    found = {}
    for each in reader.tensors:
        block = str(each.name).removeprefix("direction.")
        if not block.isdecimal():
            raise UserError(f"{path} holds {each.name!r}, and a control vector holds direction.1, direction.2, ...")
        values = torch.from_numpy(dequantize(each.data, each.tensor_type).copy())
        found[f"blocks.{int(block)}.hook_resid_post"] = values.reshape(-1)
    return found


_OTHER_TENSORS = {
    ".safetensors": _read_safetensors,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".gguf": _read_gguf,
}


def _read_saved(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except pickle.UnpicklingError:  # torch would advise to run what is in it
        raise UserError(f"{path} is not a file of plain tensors saved by torch.save") from None
    except Exception as error:  # foreign code
        reason = f"{type(error).__name__} {next(iter(str(error).splitlines()), '')}"
        raise UserError(f"{path} is not a file of plain tensors saved by torch.save: {reason}") from None


def read_floats(path: Path, *sizes: int | None) -> "Tensor":
    """Read a file of one tensor of real numbers; of a file of tensors by name that has one, that one.

    Args:
        sizes: of its axes, None where any will do; none at all where any shape will do.

    Raises:
        UserError: it holds something else.
    """
    held = read_tensors(path)
    is_named = Path(path).suffix in _OTHER_TENSORS and isinstance(held, dict) and len(held) == 1
    return floats(path, next(iter(held.values())) if is_named else held, *sizes)


def floats(path: Path, held: Any, *sizes: int | None) -> "Tensor":
    """What a file holds, if it is one dense tensor of real numbers of these sizes.

    Raises:
        UserError: it is something else.
    """
    import torch

    is_plain = isinstance(held, torch.Tensor) and held.layout is torch.strided and held.is_floating_point()
    is_plain = is_plain and not held.is_meta
    fits = is_plain and (
        not sizes
        or (held.ndim == len(sizes) and all(want in (None, have) for want, have in zip(sizes, held.shape, strict=True)))
    )
    if fits:
        return held.detach()
    found = f"{held.dtype} of shape {list(held.shape)}" if isinstance(held, torch.Tensor) else type(held).__name__
    wanted = f" of shape [{', '.join('...' if size is None else str(size) for size in sizes)}]" if sizes else ""
    raise UserError(f"{path} holds {found}; expected a tensor of floats{wanted}")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(as_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
