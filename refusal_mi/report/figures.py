"""The figures of a report, each for a wide and for a narrow window, as JSON that a script element can hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import plotly.graph_objects as go

from ..plots import plot_losses, plot_norms, plot_rates, plot_score_panels
from .folder import RunRecord

WIDTHS = (1080, 360)
"""What the legends are laid out for (px): a desktop window and a phone."""


@dataclass(frozen=True)
class FigurePair:
    """One figure in two shapes."""

    wide: go.Figure
    narrow: go.Figure


def report_figures(record: RunRecord) -> dict[str, FigurePair]:
    """Every figure that the run has data for, by name."""
    found: dict[str, FigurePair] = {}
    tokens, model, selection = record.tokens, record.model_name, record.selection
    if record.scores is not None and selection is not None:
        chosen = selection.survivors[0] if selection.survivors and not record.combination else None
        wide, narrow = (
            plot_score_panels(
                record.scores, chosen=chosen, thresholds=record.thresholds, tokens=tokens, model=model, columns=columns
            )
            for columns in (3, 1)
        )
        found["scores"] = FigurePair(wide, narrow)
    elif record.norms is not None:
        norms, positions = record.norms["norms"], record.norms["positions"]
        n_prompts = record.norms["n_harmful"] + record.norms["n_harmless"]
        wide, narrow = (
            plot_norms(norms, positions, tokens=tokens, model=model, n_prompts=n_prompts, width=width)
            for width in WIDTHS
        )
        found["norms"] = FigurePair(wide, narrow)
    if record.sides:
        wide, narrow = (plot_rates(record.sides, model=model, columns=columns) for columns in (2, 1))
        found["rates"] = FigurePair(wide, narrow)
    if record.losses:
        wide, narrow = (plot_losses(record.losses, model=model, width=width) for width in WIDTHS)
        found["losses"] = FigurePair(wide, narrow)
    return found


def embedded_json(figures: Mapping[str, FigurePair]) -> str:
    """All figures as JSON in which no markup can begin: <, > and & are written as escapes."""
    shapes = {
        name: {shape: figure.to_plotly_json() for shape, figure in vars(pair).items()} for name, pair in figures.items()
    }
    text = json.dumps(shapes, allow_nan=False, separators=(",", ":"), default=list)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
