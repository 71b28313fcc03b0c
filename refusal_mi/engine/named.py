"""Engines by the names that the command line has for them."""

from contextlib import AbstractContextManager, nullcontext

from ..errors import UserError
from .cluster import RayEngine
from .jobs import Engine

LOCAL, RAY = "local", "ray"


def engine_named(name: str, n_workers: int | None = None) -> AbstractContextManager[Engine | None]:
    """The engine that an option names, until the end of a with block: local (None), ray, or ray://HOST:PORT.

    Raises:
        UserError: there is no such engine, it is not installed, or nothing answers there.
    """
    if name == LOCAL:
        if n_workers is not None:
            raise UserError("--workers is for --engine ray: in this process, one item runs after the other")
        return nullcontext()
    kind, colon, _ = name.partition("://")
    if kind != RAY:
        raise UserError(f"--engine takes {LOCAL}, {RAY} or {RAY}://HOST:PORT, not {name!r}")
    return RayEngine(name if colon else None, n_workers=n_workers)
