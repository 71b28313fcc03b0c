"""Dose and response: every measure against the coefficient and the ablation strength."""

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from ..analysis.dose import DoseResult, Measure, Side
from ..plots.style import finish
from .parts import CONTROL, WIDTH, band, group_style, line, number, subtitle, zero_line

_ROWS: tuple[tuple[Measure, str], ...] = (
    ("score", "refusal score (nats)"),
    ("refused", "refused (fraction)"),
    ("degenerate", "degenerate (fraction)"),
    ("kl", "KL (nats)"),
)
_SIDES: tuple[Side, ...] = ("harmful", "harmless")
_RANDOM = "random directions, mean and range"
_CE = "text"


def plot_dose(result: DoseResult) -> go.Figure:
    """Refusal score, refusal rate, degenerate rate, KL and CE loss: the direction's curves over random ones."""
    rows = [row for row in _ROWS if any(point for point in result.band(row[0], "add/harmful"))]
    has_loss = not bool(result.ce_loss["add"].isnan().all())
    titles = ["<b>addition</b>", "<b>ablation</b>"] + [""] * (2 * (len(rows) + has_loss) - 2)
    figure = make_subplots(
        len(rows) + has_loss,
        2,
        subplot_titles=titles,
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.03,
    )
    for index, (measure, label) in enumerate(rows, start=1):
        for column, kind in enumerate(("add", "ablate"), start=1):
            place = {"row": index, "col": column}
            for side in _SIDES:
                _draw(figure, result, measure, f"{kind}/{side}", side, place)
            zero_line(figure, **place)
        figure.update_yaxes(title=label, row=index, col=1)
        figure.update_yaxes(range=_range(result, measure), row=index)
    if has_loss:
        _draw_loss(figure, result, len(rows) + 1)
    last = len(rows) + has_loss
    figure.update_xaxes(title="coefficient (raw direction lengths)", row=last, col=1)
    figure.update_xaxes(title="strength (fraction removed)", row=last, col=2)
    figure.update_annotations(font_size=13)
    names = [_name(result, side) for side in _SIDES] + [_RANDOM] * (result.n_random > 0)
    about = subtitle(
        result.model_name,
        f"‖r‖ = {result.norm:.3g}",
        "95% intervals",
        f"{result.n_random} random directions of equal norm",
        _z_note(result),
    )
    title = "Dose and response"
    height = 175 * last
    return finish(figure, title=title, about=about, height=height, legend_names=names, width=WIDTH, top=104)


def _draw(
    figure: go.Figure, result: DoseResult, measure: Measure, curve: str, side: Side, place: dict[str, int]
) -> None:
    x = list(result.amounts(curve))
    control = [point for point in result.control_band(measure, curve) if point is not None]
    if control:
        hover = f"random directions, {side} prompts, %{{x}}<br>mean %{{y:.3f}}<extra></extra>"
        is_named = side == "harmful" and place == {"row": 1, "col": 1}
        _draw_control(figure, x, control, hover, place, is_named=is_named)
    index, name = _SIDES.index(side), _name(result, side)
    found = [point for point in result.band(measure, curve) if point is not None]
    if len(found) < len(x):
        return
    style = group_style(index)
    figure.add_trace(band(x, [low for _, low, _ in found], [high for _, _, high in found], name, style), **place)
    hover = f"<b>{side} prompts</b>, %{{x}}<br>%{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
    z = result.z(curve) if measure == "score" and result.n_random >= 3 else None
    hover += "<br>z against random directions %{customdata[2]}<extra></extra>" if z is not None else "<extra></extra>"
    zs = ["" if value is None else number(value, 1) for value in z] if z is not None else [""] * len(found)
    custom = [[low, high, each] for (_, low, high), each in zip(found, zs, strict=True)]
    trace = line(x, [mean for mean, _, _ in found], name, style, customdata=custom, hovertemplate=hover)
    trace.showlegend = place == {"row": 1, "col": 1}
    figure.add_trace(trace, **place)


def _draw_loss(figure: go.Figure, result: DoseResult, row: int) -> None:
    style = group_style(2)
    for column, kind in enumerate(("add", "ablate"), start=1):
        x, losses = list(result.amounts(kind)), result.ce_loss[kind]
        control = losses[1:][~losses[1:].isnan().any(-1)]
        hover = "%{x}<br>CE loss %{y:.3f} nats per token<extra></extra>"
        if len(control):
            columns = (control.mean(0), control.amin(0), control.amax(0))
            points = list(zip(*(values.tolist() for values in columns), strict=True))
            _draw_control(figure, x, points, hover, {"row": row, "col": column}, is_named=False)
        trace = line(x, losses[0].tolist(), _CE, style, hovertemplate=hover)
        trace.showlegend = False
        figure.add_trace(trace, row=row, col=column)
    values = torch.cat([losses.flatten() for losses in result.ce_loss.values()])
    values = values[~values.isnan()]
    figure.update_yaxes(range=_padded(float(values.min()), float(values.max())), row=row)
    figure.update_yaxes(title="CE loss (nats/token)", row=row, col=1)


def _range(result: DoseResult, measure: Measure) -> list[float]:
    """What holds every curve, its interval and 0; set by hand, because matched axes do not find it together."""
    if measure in ("refused", "degenerate"):
        return [-0.04, 1.04]
    curves = [
        band for curve in result.scores for band in (result.band(measure, curve), result.control_band(measure, curve))
    ]
    values = [value for points in curves for point in points if point is not None for value in point]
    return _padded(min(0.0, *values), max(0.0, *values))


def _padded(low: float, high: float) -> list[float]:
    room = 0.06 * max(high - low, 1e-9)
    return [low - room, high + room]


def _draw_control(
    figure: go.Figure,
    x: list[float],
    points: list[tuple[float, float, float]],
    hover: str,
    place: dict[str, int],
    *,
    is_named: bool,
) -> None:
    """Mean and range over random directions."""
    figure.add_trace(band(x, [low for _, low, _ in points], [high for _, _, high in points], _RANDOM, CONTROL), **place)
    trace = line(x, [mean for mean, _, _ in points], _RANDOM, CONTROL, hovertemplate=hover)
    trace.update(mode="lines", line_width=1.2, showlegend=is_named)
    figure.add_trace(trace, **place)


def _z_note(result: DoseResult) -> str:
    """How far the largest doses within 1 lie beyond the random directions."""
    found = []
    for curve, what in (("add/harmless", "added, harmless"), ("ablate/harmful", "ablated, harmful")):
        within = [(amount, z) for amount, z in zip(result.amounts(curve), result.z(curve), strict=True) if amount <= 1]
        amount, z = max(within, default=(0.0, None))
        if z is not None:
            found.append(f"z = {number(z, 0)} ({amount:g} {what})")
    return ", ".join(found)


def _name(result: DoseResult, side: Side) -> str:
    return f"{side} prompts (n = {result.n_prompts(side)})"


FIGURES = {"dose": plot_dose}
