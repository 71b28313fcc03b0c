"""What an audit found, write by write: how much of a direction was removed, and how much the weights changed."""

import math
from typing import Unpack

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from ..audit.result import COMPONENTS, AuditResult
from . import style as draw

_ROWS = ("embed", "attention", "MLP")


def plot_audit(result: AuditResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Strength of the removal, and change of the weights, of every block's writers (means where there are several).

    Examples:
        >>> plot_audit(audit(base, edited), width=600).layout.width
        600
    """
    layers = [str(block) for block in range(result.n_layers)]
    tables = torch.full((2, len(_ROWS), len(layers)), math.nan, dtype=torch.float64)
    for row, component in enumerate(COMPONENTS):
        for column in range(len(layers)):
            cell = [
                each
                for each in result.writers
                if each.component == component and (each.block or 0) == column and "bias" not in each.name
            ]
            if cell:
                tables[0, row, column] = sum(each.strength or 0.0 for each in cell) / len(cell)
                tables[1, row, column] = 100 * sum(each.change for each in cell) / len(cell)
    titles = ["<b>strength</b>: 1 removes all that BASE writes along it", "<b>change</b>: ‖W′ − W‖ / ‖W‖"]
    figure = make_subplots(2, 1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.2)
    hovers = "strength %{z:.3f}", "changed by %{z:.3f} %"
    for index, (values, unit, hover) in enumerate(zip(tables, ("strength", "%"), hovers, strict=True)):
        known = values[~values.isnan()]
        limits = min(0.0, float(known.min())), max(1.0 if index == 0 else 1e-9, float(known.max()))
        trace = draw.heatmap(
            values,
            layers,
            _ROWS,
            unit,
            hover=f"%{{y}} of block %{{x}}<br>{hover}",
            limits=limits,
            colorbar={"len": 0.45, "y": 0.79 - 0.57 * index},
        )
        figure.add_trace(trace, row=index + 1, col=1)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="block", row=2, col=1)
    figure.update_annotations(font_size=13)
    found = {
        "removed": f"directions removed: {len(result.directions)}",
        "own": "each tensor lost directions of its own",
        "other": "no direction was removed",
    }
    about = draw.subtitle(f"{result.suspect} against {result.base}", found.get(result.verdict, "nothing changed"))
    return draw.finish(figure, title="What was removed, and from where", about=about, height=240, look=look)
