"""Named directions beside each other."""

import plotly.graph_objects as go

from ..analysis.comparison import ComparisonResult
from ..plots.style import finish, plain
from .parts import heatmap, subtitle, with_room_below


def plot_comparison(result: ComparisonResult) -> go.Figure:
    """Cosine of every pair of directions; under the title what random directions reach."""
    names = [name.replace("position -", "position −") for name in result.names]
    labels = [plain(f"{name} (‖r‖ = {norm:.3g})") for name, norm in zip(names, result.norms.tolist(), strict=True)]
    hover = "%{x}<br>%{y}<br>cosine %{z:.4f}"
    columns = [plain(name) for name in names]
    figure = go.Figure(heatmap(result.cosines, columns, labels, "cosine", hover=hover, limits=(-1.0, 1.0)))
    figure.update_xaxes(type="category", tickangle=-30, title="direction")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, title="direction")
    null = f"95% of random pairs in {result.d_model} dimensions: |cosine| < {result.null_p95:.3f}"
    about = subtitle(result.model_name, f"n = {len(labels)} directions", null)
    height = max(220, 36 * len(labels))
    figure = finish(figure, title="Cosine between directions", about=about, height=height, legend_names=[], width=760)
    return with_room_below(figure, names, 0.5)


FIGURES = {"comparison": plot_comparison}
