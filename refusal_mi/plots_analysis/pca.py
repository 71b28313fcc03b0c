"""Prompts on the first two principal components of the stream."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..analysis.pca import PcaResult
from ..errors import UserError
from ..plots.style import finish
from .parts import WIDTH, group_style, number, shortened, signed, subtitle

_FILLED = {"refused": True, "answered": False, None: True}
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross")


def plot_pca(result: PcaResult) -> go.Figure:
    """One panel per layer: shape and color are the group, filled is refused, open is answered.

    Raises:
        UserError: there is only one component.
    """
    if result.coordinates.shape[2] < 2:
        raise UserError("a picture needs 2 components; call residual_pca with n_components=2")
    n = len(result.layers)
    figure = make_subplots(1, n, subplot_titles=[_panel(result, row) for row in range(n)], horizontal_spacing=0.09)
    names: list[str] = []
    for row in range(n):
        for index, group in enumerate(dict.fromkeys(result.groups)):
            for outcome in dict.fromkeys(result.outcomes):
                rows = [
                    i
                    for i, found in enumerate(zip(result.groups, result.outcomes, strict=True))
                    if found == (group, outcome)
                ]
                if rows:
                    name = f"{group}{f', {outcome}' if outcome else ''} (n = {len(rows)})"
                    names.append(name)
                    trace = _points(result, row, rows, name, index, is_filled=_FILLED[outcome])
                    trace.showlegend = row == 0
                    figure.add_trace(trace, row=1, col=row + 1)
        first, second = (100 * float(value) for value in result.explained[row, :2])
        cosine = float(result.direction_cosines[row, 0])
        figure.update_xaxes(title=f"component 1 ({first:.0f}%, cosine with r {number(cosine)})", col=row + 1)
        figure.update_yaxes(title=f"component 2 ({second:.0f}%)", col=row + 1)
    figure.update_annotations(font_size=13)
    about = subtitle(
        result.model_name,
        f"n = {len(result.prompts)} prompts",
        f"position {signed(result.position)}",
        "residual stream units",
        "percent: share of variance",
    )
    legend = list(dict.fromkeys(names))
    title = "Principal components of the stream"
    return finish(figure, title=title, about=about, height=360, legend_names=legend, width=WIDTH, top=122)


def _points(result: PcaResult, row: int, rows: list[int], name: str, index: int, *, is_filled: bool) -> go.Scatter:
    color = group_style(index).color
    shape = _SHAPES[index % len(_SHAPES)]
    return go.Scatter(
        x=result.coordinates[row, rows, 0].tolist(),
        y=result.coordinates[row, rows, 1].tolist(),
        mode="markers",
        name=name,
        legendgroup=name,
        marker={
            "symbol": shape if is_filled else f"{shape}-open",
            "color": color,
            "size": 8,
            "opacity": 0.8,
            "line": {"color": color if not is_filled else "white", "width": 1.4 if not is_filled else 0.6},
        },
        customdata=[shortened(result.prompts[i]) for i in rows],
        hovertemplate=f"<b>{name}</b><br>%{{customdata}}<br>(%{{x:.3g}}, %{{y:.3g}})<extra></extra>",
    )


def _panel(result: PcaResult, row: int) -> str:
    value, null = float(result.separation[row]), float(result.separation_null_p95[row])
    if value != value:
        note = "no variance: all prompts at one point"
    else:
        note = f"silhouette {number(value)}, shuffled {number(null)}"
    return f"<b>layer {result.layers[row]}</b><br>{note}"


FIGURES = {"pca": plot_pca}
