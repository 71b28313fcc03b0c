"""A directory that appears under its name only when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ..errors import UserError


@contextmanager
def fresh_directory(out: str | Path, source: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, which takes its name once everything has been written.

    What was there before goes only then.

    Raises:
        UserError: `out` exists and `force` was not given, it lies in (or around) the source, or it cannot be written.
    """
    target = output_path(out, source, force=force)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _rename(temporary, target)
    except OSError as error:
        if error.errno is None:  # not from the file system
            raise
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def output_path(out: str | Path, source: Path, *, force: bool) -> Path:
    """The absolute output path, if it may be written."""
    target = Path(out).expanduser().absolute()
    place, origin = target.resolve(), source.resolve()
    if place == origin or place in origin.parents or origin in place.parents:
        raise UserError(f"{target} is the source, or one lies in the other; choose an --output-dir beside it")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise UserError(f"{target} is (or contains) the folder you are in; choose another --output-dir")
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another --output-dir, or replace it with --force")
    return target


def _rename(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
