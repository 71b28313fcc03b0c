"""Figures of analyses: `plot(result)` for the main one, `figures(result)` for all; no model, no disk.

The module of a kind of analysis has `plot_x(result) -> Figure` functions and lists them in `FIGURES`, by the names
that files get. One that needs what a result may lack raises UserError.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import plotly.graph_objects as go

from ..analysis.result import AnalysisResult
from ..errors import UserError


@dataclass(frozen=True)
class Drawn:
    """The figures of a result."""

    figures: dict[str, go.Figure | str]
    """By name, the main one first; a complete HTML page where plotly has no such view."""
    left_out: dict[str, str]
    """Name -> why the result has no such figure."""


def plot(result: AnalysisResult) -> go.Figure | str:
    """The main figure of a result; a complete HTML page where plotly has no such view."""
    return next(iter(_figures_of(result).values()))(result)


def figures(result: AnalysisResult) -> dict[str, go.Figure | str]:
    """Every figure that a result has, by name; the main one first. A warning says which are missing, and why."""
    drawn = draw_all(result)
    for name, why in drawn.left_out.items():
        warnings.warn(f"no figure {name}: {why}", stacklevel=2)
    return drawn.figures


def draw_all(result: AnalysisResult) -> Drawn:
    """Every figure that a result has, and why it has no others."""
    drawn, left_out = {}, {}
    for name, draw in _figures_of(result).items():
        try:
            drawn[name] = draw(result)
        except UserError as error:
            left_out[name] = str(error)
    return Drawn(drawn, left_out)


def _figures_of(result: AnalysisResult) -> dict[str, Callable[[AnalysisResult], go.Figure | str]]:
    return import_module(f"{__name__}.{result.kind}").FIGURES
