"""Ordinary checkpoints, adapters and vector files that do what the hooks did, and say how closely."""

from typing import Any

_HOME = {
    "ExportReport": "export",
    "export_checkpoint": "export",
    "orthogonalize_": "export",
    "export_adapter": "export",
    "load_adapter": "adapter",
    "write_gguf": "formats",
    "write_lm_eval": "formats",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
