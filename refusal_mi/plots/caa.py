"""How adding and subtracting a vector moves the model's choice, by layer."""

import plotly.graph_objects as go

from ..pipelines.caa_ab import ABSweep
from .style import ACCENT, INK, MUTED, finish, plain

_STYLES = {1: ("#33508f", "solid", "circle"), -1: (ACCENT, "dash", "square")}


def plot_layer_sweep(sweep: ABSweep, *, model: str = "", multipliers: tuple[float, ...] = (1.0, -1.0)) -> go.Figure:
    """Change of p(matching answer) against CAA's layer, one line per multiplier, with 95% intervals."""
    figure, names = go.Figure(), []
    for multiplier in multipliers:
        points = sorted((point for point in sweep.points if point.multiplier == multiplier), key=lambda p: p.layer)
        if not points:
            continue
        color, dash, symbol = _STYLES.get(1 if multiplier > 0 else -1, (INK, "dot", "diamond"))
        names.append(f"multiplier {multiplier:+g}".replace("-", "−"))
        figure.add_trace(
            go.Scatter(
                x=[point.layer for point in points],
                y=[point.delta for point in points],
                mode="lines+markers",
                name=names[-1],
                line={"color": color, "dash": dash},
                marker={"symbol": symbol, "size": 8},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [point.delta_high - point.delta for point in points],
                    "arrayminus": [point.delta - point.delta_low for point in points],
                    "thickness": 1,
                    "width": 3,
                },
                customdata=[[point.p, point.low, point.high] for point in points],
                hovertemplate="output of block %{x}<br>p = %{customdata[0]:.3f} [%{customdata[1]:.3f}, "
                "%{customdata[2]:.3f}]<br>change %{y:+.3f}<extra></extra>",
            )
        )
    figure.add_hline(0, line={"color": MUTED, "width": 1})
    figure.update_xaxes(title="layer (output of block)", dtick=1 if len(sweep.points) <= 48 else None)
    figure.update_yaxes(title="change of p(matching answer)")
    n = sweep.points[0].n_pairs if sweep.points else 0
    parts = [plain(model), f"{plain(sweep.pairs)}, n = {n} pairs", f"plain p = {sweep.plain:.3f}", "95% intervals"]
    return finish(
        figure,
        title="Steering by layer: p(matching answer)",
        about=" · ".join(part for part in parts if part),
        height=380,
        legend_names=names,
        width=900,
    )
