"""Analyses around a refusal direction: one call each, one frozen result each, one more call to plot it.

    from refusal_mi.analysis import project_residuals
    from refusal_mi.analysis.result import plot

    plot(project_residuals(model, chat, direction, {"harmful": [...], "harmless": [...]}))

An analysis and its module, which holds its result, its computation and its figures, share one name. Called with a
model and a finished run, the module does it with what the run has: `analysis.projections(model, "runs/x")`. Names are
imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import AnalysisResult as AnalysisResult
    from .result import load_result as load_result

KINDS: dict[str, tuple[str, ...]] = {
    "lens": ("refusal_lens", "LensResult"),
    "projections": ("project_residuals", "ProjectionsResult"),
    "token_map": ("map_tokens", "TokenMapResult"),
    "geometry": ("direction_geometry", "GeometryResult"),
    "comparison": ("compare_directions", "ComparisonResult"),
    "probes": ("linear_probes", "ProbesResult"),
    "pca": ("residual_pca", "PcaResult"),
    "logits": ("direction_logits", "LogitsResult"),
    "weights": ("weight_alignment", "WeightsResult"),
    "attribution": ("attribute_direction", "AttributionResult"),
    "sources": ("attribute_sources", "SourcesResult"),
    "attention": ("attend_by_region", "AttentionResult"),
    "patching": ("patch_activations", "PatchingResult"),
    "dose": ("dose_response", "DoseResult"),
    "trace": ("trace_generation", "TraceResult"),
    "harm": ("separate_harm", "HarmResult"),
}
"""Every analysis -> the public names of its module, in the order in which `analyze` runs them."""
_HOME = {
    "AnalysisResult": "result",
    "load_result": "result",
    **{name: kind for kind, names in KINDS.items() for name in names},
}

__all__ = ["KINDS", *_HOME]
"""Functions and results; the modules, which are called like common words, are asked for by name."""


def __getattr__(name: str) -> Any:
    if name in KINDS:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *KINDS])
