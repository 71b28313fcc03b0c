"""Pieces that figures of analyses share: bands, heat maps, labels."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..plots.style import INK, MUTED, SeriesStyle, plain, token_text

WIDTH = 1080
SCALE = "Cividis"
"""Lightness grows with the value, also across zero, so that a printed copy reads the same."""
CONTROL = SeriesStyle("#8a8a8a", "dot", "x")
_GROUPS = (
    SeriesStyle("#8c1c13", "solid", "circle"),
    SeriesStyle("#2f75b5", "dash", "square-open"),
    SeriesStyle("#1a1a1a", "dashdot", "diamond"),
    SeriesStyle("#b8860b", "longdash", "triangle-up"),
    SeriesStyle("#5b3f8c", "longdashdot", "cross"),
)
_MAX_CELLS_WITH_TEXT = 130
_CHARACTER = 7.4
"""Width of a character of a tick label (px)."""


def group_style(index: int) -> SeriesStyle:
    """The look of one group of prompts; the first two are harmful and harmless."""
    return _GROUPS[index % len(_GROUPS)]


def bars(index: int) -> dict[str, Any]:
    """The marker of the bars of one group: a tint that leaves error bars visible, told apart by its hatching."""
    color = group_style(index).color
    shape = ("", "/", ".", "x", "\\")[index % 5]
    pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": color, "size": 7, "solidity": 0.3}
    return {"color": _tint(color), "line": {"color": color, "width": 1.2}, "pattern": pattern}


def subtitle(*parts: str) -> str:
    """Model, n and notes under the title."""
    return " · ".join(plain(part) for part in parts if part)


def signed(number: int | None) -> str:
    """A position as it is printed."""
    return "none" if number is None else str(number).replace("-", "−")


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def quoted(token: str) -> str:
    """A vocabulary entry in quotes."""
    return plain(f"'{token_text(token)}'")


def position_label(position: int, token: str) -> str:
    """−1 '\\n'."""
    return f"{signed(position)} {quoted(token)}" if token else signed(position)


def shortened(text: str, width: int = 90) -> str:
    """A prompt in a hover label."""
    flat = " ".join(text.split())
    return plain(flat if len(flat) <= width else flat[: width - 1] + "…")


def line(x: Sequence[Any], y: Sequence[float | None], name: str, style: SeriesStyle, **extra: Any) -> go.Scatter:
    """A line with markers."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash, "width": 1.8},
        marker={"color": style.color, "symbol": style.symbol, "size": 7},
        **extra,
    )


def band(x: Sequence[Any], low: Sequence[float], high: Sequence[float], name: str, style: SeriesStyle) -> go.Scatter:
    """A shaded band that belongs to the line `name`."""
    return go.Scatter(
        x=[*x, *reversed(list(x))],
        y=[*high, *reversed(list(low))],
        fill="toself",
        fillcolor=_faint(style.color),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
        name=f"{name} (band)",
    )


def heatmap(
    values: Float[Tensor, "row column"],
    x: Sequence[str],
    y: Sequence[str],
    unit: str,
    *,
    hover: str,
    custom: Any = None,
    limits: tuple[float, float] | None = None,
    digits: int = 2,
    colorbar: dict[str, Any] | None = None,
) -> go.Heatmap:
    """A table of numbers in tones of one scale, printed in the cells where they fit; NaN stays white."""
    shows_text = values.numel() <= _MAX_CELLS_WITH_TEXT
    rows = [[None if value != value else value for value in row] for row in values.tolist()]
    text = [["" if value is None else number(value, digits) for value in row] for row in rows]
    return go.Heatmap(
        z=rows,
        x=list(x),
        y=list(y),
        colorscale=SCALE,
        zmin=limits[0] if limits else None,
        zmax=limits[1] if limits else None,
        text=text if shows_text else None,
        texttemplate="%{text}" if shows_text else None,
        textfont={"size": 11},
        customdata=custom,
        hovertemplate=f"{hover}<extra></extra>",
        colorbar={
            "title": {"text": unit, "side": "right", "font": {"size": 12}},
            "tickfont": {"size": 11},
            "thickness": 14,
            "outlinewidth": 0,
            **(colorbar or {}),
        },
        xgap=1,
        ygap=1,
    )


def with_room_below(figure: go.Figure, labels: Sequence[str], slope: float = 1.0) -> go.Figure:
    """Grow a figure by what its slanted labels on the x axis need (`slope`: 1 is upright, 0.5 is at 30°)."""
    room = round(slope * _CHARACTER * max(map(len, labels), default=0))
    return figure.update_layout(height=figure.layout.height + room, margin_b=figure.layout.margin.b + room)


def zero_line(figure: go.Figure, value: float = 0.0, **place: Any) -> None:
    """A thin horizontal line."""
    figure.add_hline(value, line={"color": MUTED, "width": 1}, **place)


def mark_layer(figure: go.Figure, layer: int, text: str, **place: Any) -> None:
    """A thin vertical line with a word at its top."""
    figure.add_vline(layer, line={"color": INK, "width": 1, "dash": "dot"}, **place)
    figure.add_annotation(
        x=layer, y=1, yref="y domain", yanchor="bottom", text=text, showarrow=False, font={"size": 11}, **place
    )


def _faint(color: str) -> str:
    red, green, blue = _parts(color)
    return f"rgba({red},{green},{blue},0.14)"


def _tint(color: str) -> str:
    red, green, blue = (255 - (255 - part) * 4 // 10 for part in _parts(color))
    return f"rgb({red},{green},{blue})"


def _parts(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]
