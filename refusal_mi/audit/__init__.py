"""Whether a direction was removed from a checkpoint: which, where, how strongly, from its weights alone."""

from typing import Any

_HOME = {"AuditResult": "result", "audit": "compare"}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
