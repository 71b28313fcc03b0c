"""Rows of a file, told by what it holds: JSON, JSON Lines, CSV, TSV, Parquet or lines of text, maybe gzipped."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import UserError, cause

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_LISTS = ("data", "rows", "examples", "prompts", "instructions")
"""Keys under which a JSON object holds its rows."""
_LARGEST = 2**31
"""Bytes that a gzipped file may have unpacked."""
_DELIMITERS = ",;\t"
_BOMS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}


def exists(name: str) -> bool:
    """Whether a file or folder of this name is there; no text is too odd to ask."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def is_file_name(name: str) -> bool:
    """Whether this is meant as a file or folder, not as the name of a set."""
    return exists(name) or _format(Path(name)) is not None


def read_rows(path: Path) -> list[Any]:
    """The rows of a file, or of all files of a folder in the order of their names.

    Raises:
        UserError: there is no such file, its format is unknown, or it is not what it seems to be.
    """
    if path.is_dir():
        files = [each for each in sorted(path.iterdir()) if each.is_file() and _format(each) is not None]
        if not files:
            raise UserError(f"the folder {path} holds no file of a known format ({', '.join(SUFFIXES)})")
        return [row for each in files for row in read_rows(each)]
    if not path.exists():
        raise UserError(f"no such file: {path}{_near(path)}")
    content = _content(path)
    if content.startswith(b"PAR1"):
        return _parquet_rows(path, content)
    text, suffix = _text(path, content), _format(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, text)
    if suffix == ".parquet":
        raise UserError(f"{path} cannot be read as Parquet: it does not begin like one")
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return _json_rows(path, text)
        except UserError:
            if suffix != ".txt":
                raise
    elif suffix in (".json", ".jsonl", ".ndjson"):
        if not text.strip():
            return []
        return _json_rows(path, text)
    elif suffix != ".txt":
        if not text.strip():
            raise UserError(f"{path} is empty")
        raise UserError(f"{path}: format unknown; expected {', '.join(SUFFIXES)}, maybe with .gz")
    return _lines(text)


def _near(path: Path) -> str:
    """A file beside it that may be meant."""
    there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=1, cutoff=0.75)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _format(path: Path) -> str | None:
    """The known suffix, before .gz."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if not content.startswith(b"\x1f\x8b"):
            return content
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(_LARGEST + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be read as gzip: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(unpacked) > _LARGEST:
        raise UserError(f"{path} unpacks to more than {_LARGEST >> 30} GiB")
    return unpacked


def _text(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise UserError(
            f"{path} is not UTF-8 text: it holds NUL characters, as binary files and UTF-16 without a mark do"
        )
    return text


def _lines(text: str) -> list[str]:
    """Not those of `splitlines`, which also splits at characters that JSON allows inside a string, as U+2028."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _json_rows(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = _lines(text)
        try:
            if len(lines) > 1 or _format(path) in (".jsonl", ".ndjson"):
                return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as of_lines:
            if _format(path) in (".jsonl", ".ndjson"):
                raise UserError(f"{path} cannot be read as JSON Lines: {_cause(of_lines)}") from None
        raise UserError(f"{path} cannot be read as JSON: {_cause(error)}") from None
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON list of texts or objects, not {type(value).__name__}")
    return _rows_of(path, value)


def _cause(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _rows_of(path: Path, value: Mapping[str, Any]) -> list[Any]:
    """The rows of a JSON object: a list in it, columns of equal length, or itself."""
    lists = {key: each for key, each in value.items() if isinstance(each, list)}
    named = [key for key in _LISTS if key in lists]
    if named and (len(lists) == 1 or all(isinstance(row, dict) for row in lists[named[0]])):
        return lists[named[0]]
    columns = {key: list(each.values()) if isinstance(each, dict) else each for key, each in value.items()}
    if columns and all(isinstance(each, list) for each in columns.values()):
        lengths = {len(each) for each in columns.values()}
        if len(columns) == 1 and not named:
            (rows,) = columns.values()
            if all(isinstance(row, dict) for row in rows):
                return rows
        if len(lengths) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if all(isinstance(each, str | int | float | None) for each in value.values()) and value:
        return [value]
    raise UserError(
        f"{path} holds a JSON object with {', '.join(map(repr, list(value)[:5])) or 'nothing'}: expected a list of "
        f"texts or objects, such a list under one of {', '.join(_LISTS)}, or columns of equal length"
    )


def _csv_rows(path: Path, text: str) -> list[Any]:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if _format(path) == ".tsv" else max(_DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        names = [name for name in reader.fieldnames or () if name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path} has two columns named {twice!r}, of which one would be lost")
        for row in reader:
            if None in row:
                raise UserError(f"{path}, line {reader.line_num}: more fields than the header has; quote the commas")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: cannot be read as CSV: {error}") from None
    return rows


def _parquet_rows(path: Path, content: bytes) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except Exception as error:  # foreign code: pyarrow raises many kinds
        raise UserError(f"{path} cannot be read as Parquet: {cause(error)}") from None
