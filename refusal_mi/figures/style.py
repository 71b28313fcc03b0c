"""The look that all figures share: white ground, told apart without color, labels that cannot carry markup."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import Tensor

from ..errors import UserError
from ..values import named_near
from .fit import BASE, laid_out, prepared
from .text import plain as plain
from .text import quoted as quoted
from .text import shortened as shortened
from .text import token_text as token_text

INK, MUTED, GRID, ACCENT, SHADE = "#1a1a1a", "#6b6b6b", "#e4e4e4", "#b3261e", "rgba(120,120,120,0.14)"
WIDTH = 1080
"""What a figure is laid out for (px)."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_DASHES = ("solid", "6px,2px", "2px,2px", "6px,2px,2px,2px", "9px,3px", "6px,2px,2px,2px,2px,2px")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross")


@dataclass(frozen=True)
class SeriesStyle:
    """How one line of many is drawn; dash and symbol tell it apart where color does not."""

    color: str
    dash: str
    symbol: str


def series_styles(n: int) -> list[SeriesStyle]:
    """One style for each of `n` ordered series, from light to dark; no two share both dash and symbol up to 42.

    The last one, the position that the answer is read at, is dark and solid.
    """
    places = [0.72 * (1 - index / max(1, n - 1)) for index in range(n)]
    colors = sample_colorscale("Viridis", places) if n else []
    return [
        SeriesStyle(color, _DASHES[back % len(_DASHES)], _SYMBOLS[back % len(_SYMBOLS)])
        for color, back in zip(colors, reversed(range(n)), strict=True)
    ]


class Look(TypedDict, total=False):
    """What every `plot_*` takes beside its result, as keywords; sizes follow from the width."""

    title: str
    """In place of the figure's own; "" is none."""
    width: int
    """The figure's width (px); without one it is laid out for 1080 and as wide as what it stands in."""
    height: int
    """The whole figure's height (px); by default what its words and a plot of the usual height need."""
    font_size: int | float
    """Of labels (px), 13 by default; titles and small print follow."""
    template: str | go.layout.Template
    """A template of plotly in place of the white page, such as "plotly_dark"."""


def finish(
    figure: go.Figure,
    *,
    title: str,
    about: str,
    height: int,
    legend_names: Sequence[str] | None = None,
    width: int = WIDTH,
    look: Look | None = None,
) -> go.Figure:
    """Apply the shared look and lay the figure out; the legend stands below the plot.

    Args:
        about: model and n, under the title.
        height: of the plotting area (px) with its panels as they were made.
        legend_names: by default of all lines and bars, the first of each name.
        width: the width (px) that the figure is laid out for where `look` says none.

    Raises:
        UserError: `look` holds something that is no part of a look, or leaves no room for the plot.
    """
    look = {} if look is None else look
    if unknown := sorted(look.keys() - Look.__annotations__.keys()):
        raise UserError(f"figures take no {unknown[0]!r}; {named_near(unknown[0], list(Look.__annotations__))}")
    for name in ("width", "height", "font_size"):
        if not 0 < look.get(name, 1) < math.inf:  # type: ignore[operator]
            raise UserError(f"{name} is a number of pixels above 0, not {look[name]!r}")  # type: ignore[literal-required]
    names = _name_once_(figure) if legend_names is None else list(legend_names)
    size = look.get("font_size", BASE)
    shown_title = plain(look["title"]) if "title" in look else title
    figure.update_layout(
        template=look.get("template", "none"),
        title={
            "x": 0,
            "xref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 16, "l": 14},
            "font": {"size": size * 17 / BASE},
            "subtitle": {"font": {"size": size * 12 / BASE}},
        },
        font={"family": FONT, "size": size},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "tracegroupgap": 2},
        hoverlabel={"align": "left"},
    )
    axis: dict[str, Any] = {"zeroline": False, "showline": True, "ticks": "outside"}
    if "template" not in look:
        _paint_(figure)
        axis |= {"gridcolor": GRID, "linecolor": MUTED}
    for note in figure.layout.annotations:
        note.font.size = (note.font.size or BASE) * size / BASE
    figure.update_xaxes(**axis, title_standoff=8, title_font_size=size, tickfont_size=size)
    figure.update_yaxes(**axis, title_standoff=8, title_font_size=size, tickfont_size=size)
    if any(trace.type == "heatmap" for trace in figure.data):
        figure.update_xaxes(showgrid=False)
        figure.update_yaxes(showgrid=False)
    return laid_out(
        prepared(
            figure,
            title=shown_title,
            about=about,
            names=names,
            width=look.get("width", width),
            is_fixed="width" in look,
            fixed_height=look.get("height"),
            height=height,
            font_size=size,
        )
    )


def _paint_(figure: go.Figure) -> None:
    """The colors of a white page; cells without a number are grey, which no number is."""
    has_table = any(trace.type == "heatmap" for trace in figure.data)
    figure.update_layout(
        font_color=INK,
        title_subtitle_font_color=MUTED,
        hoverlabel={"bgcolor": "white", "font": {"color": INK}},
        paper_bgcolor="white",
        plot_bgcolor=NO_NUMBER if has_table else "white",
    )


WARM, COOL, CHOSEN, NO_NUMBER = "#8c1c13", "#2f75b5", "#c98a00", "#dddddd"
"""Harmful prompts and refusing, harmless ones, the chosen candidate, a cell of a table without a number."""
DIVERGING = ((0.0, "#5a97cf"), (0.5, "#ffffff"), (1.0, "#ea7455"))
"""Cool below zero, white at zero, warm above; light enough for dark numbers (contrast at least 4.5) everywhere."""
SEQUENTIAL = ((0.0, "#ffffff"), (1.0, "#a58fc4"))
CONTROL = SeriesStyle("#8a8a8a", "2px,2px", "x")
_CONTROLS = (CONTROL, SeriesStyle("#6b6b6b", "6px,2px", "square-open"), SeriesStyle("#8a8a8a", "2px,2px", "diamond"))
_GROUPS = (
    SeriesStyle(WARM, "solid", "circle"),
    SeriesStyle(COOL, "6px,2px", "square-open"),
)
_OTHERS = (
    SeriesStyle(INK, "solid", "diamond"),
    SeriesStyle("#6a3d9a", "6px,2px", "triangle-up"),
    SeriesStyle("#00796b", "6px,2px,2px,2px", "triangle-down"),
    SeriesStyle("#9a6b00", "3px,2px", "hexagon"),
)

_MAX_CELLS_WITH_TEXT = 130


def group_styles(names: Sequence[str]) -> list[SeriesStyle]:
    """The look of each group of prompts: harmful ones warm and harmless ones cool, by name, or else the first two."""
    named = [1 if "harmless" in name.lower() else 0 if "harmful" in name.lower() else None for name in names]
    if None in named and not set(named) & {0, 1}:
        named[:2] = [0, 1][: len(named)]
    taken: set[int] = set()
    others = 0
    styles = []
    for index in named:
        if index is not None and index not in taken:
            taken.add(index)
            styles.append(_GROUPS[index])
        else:
            styles.append(other_style(others))
            others += 1
    return styles


def group_style(index: int) -> SeriesStyle:
    """The look of one of several groups of prompts; the first two are harmful and harmless."""
    return _GROUPS[index] if index < len(_GROUPS) else other_style(index - len(_GROUPS))


def other_style(index: int) -> SeriesStyle:
    """The look of one of several lines that are no group of prompts."""
    return _OTHERS[index % len(_OTHERS)]


def control_style(index: int) -> SeriesStyle:
    """The look of random directions on the first group of prompts, and on the second."""
    return _CONTROLS[index % len(_CONTROLS)]


def bars(index: int, style: SeriesStyle) -> dict[str, Any]:
    """The marker of the bars of one group: a tint that leaves error bars visible, told apart by its hatching."""
    color = style.color
    shape = ("", "/", ".", "x", "\\")[index % 5]
    pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": color, "size": 7, "solidity": 0.3}
    return {"color": _tint(color), "line": {"color": color, "width": 1.2}, "pattern": pattern}


def _name_once_(figure: go.Figure) -> list[str]:
    """Leave each name in the legend once, and return them."""
    names: list[str] = []
    for trace in figure.data:
        if trace.type in ("scatter", "bar") and trace.showlegend is not False:
            trace.showlegend = trace.name not in names
            if trace.showlegend:
                names.append(trace.name)
    return names


def panels(
    titles: Sequence[str], *, gap: float = 0.04, shares_y: bool = True, widths: Sequence[float] | None = None
) -> go.Figure:
    """One row of panels under bold titles; `gap` and `widths` are fractions of the whole."""
    bold = [title if "<b>" in title else f"<b>{title}</b>" for title in titles]
    figure = make_subplots(
        1,
        len(titles),
        subplot_titles=bold,
        shared_yaxes=shares_y,
        horizontal_spacing=gap,
        column_widths=None if widths is None else list(widths),
    )
    return figure.update_annotations(font_size=13)


def layer_axis(figure: go.Figure, title: str = "layer (stream entering the block)", **place: int) -> None:
    """An x axis of layers, a tick for each where there is room."""
    figure.update_xaxes(title=title, tick0=0, dtick=1, **place)


def categories(figure: go.Figure) -> None:
    """The axes of a table, its first row at the top."""
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")


def subtitle(*parts: str) -> str:
    """Model, n and notes under the title."""
    return " · ".join(plain(part) for part in parts if part)


def counted(n_prompts: Mapping[str, int]) -> str:
    """How many prompts there are of each group."""
    return "n = " + ", ".join(f"{n} {group}" for group, n in n_prompts.items()) + " prompts"


def read_at(position: int | None, layer: int) -> str:
    """Where a direction was read."""
    return f"r from position {signed(position)}, layer {layer}"


def head_names(heads: Sequence[tuple[int, int]]) -> list[str]:
    """Names of (layer, head)."""
    return [f"L{layer}.H{head}" for layer, head in heads]


def gaps(values: Any) -> Any:
    """The numbers of a tensor as plotly takes them, with None for NaN."""
    numbers = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(numbers, list):
        return [gaps(each) for each in numbers]
    return None if numbers != numbers else numbers


def symmetric(values: Float[Tensor, "..."]) -> tuple[float, float]:
    """Limits of a scale that are as far below zero as above."""
    largest = max(float(values.abs().max()), 1e-12)
    return -largest, largest


def interval_bars(intervals: Sequence[tuple[float, float, float]], width: int) -> dict[str, Any]:
    """Error bars of (mean, low, high); `width` of their ends (px)."""
    return {
        "array": [high - mean for mean, _, high in intervals],
        "arrayminus": [mean - low for mean, low, _ in intervals],
        "thickness": 1.2,
        "width": width,
    }


def signed(number: int | None) -> str:
    """A position as it is printed."""
    return "none" if number is None else str(number).replace("-", "−")


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def position_label(position: int, token: str) -> str:
    """A position and the token that stands there: −1 ⏎, −2 'assistant'."""
    text = token_text(token)
    shown = text.replace("\\n", "⏎") if text and not text.replace("\\n", "") else quoted(token)
    return f"{signed(position)} {shown}" if token else signed(position)


def position_styles(positions: Sequence[int], tokens: Sequence[str]) -> list[tuple[str, SeriesStyle]]:
    """Name and style of the line of each position."""
    names = [position_label(*each) for each in zip(positions, tokens, strict=True)]
    return list(zip(names, series_styles(len(names)), strict=True))


def line(x: Sequence[Any], y: Sequence[float | None], name: str, style: SeriesStyle, **extra: Any) -> go.Scatter:
    """A line with markers."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        legendgroup=name,
        line={"color": style.color, "dash": style.dash, "width": 1.8},
        marker={"color": style.color, "symbol": style.symbol, "size": 7},
        connectgaps=False,
        **{"mode": "lines+markers", **extra},
    )


def add_line(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[float | None],
    name: str,
    style: SeriesStyle,
    hover: str = "",
    custom: Sequence[Any] | None = None,
    **place: int,
) -> None:
    """A line with markers in one panel; `hover` may name `custom`."""
    template = f"{hover}<extra></extra>" if hover else None
    figure.add_trace(line(x, y, name, style, customdata=custom, hovertemplate=template), **place)


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


def add_spread(
    figure: go.Figure,
    values: Float[Tensor, "prompt x"],
    name: str,
    style: SeriesStyle,
    hover: str,
    **place: int,
) -> None:
    """Mean over prompts with a band of ± 1 SD."""
    x, mean, sd = range(values.shape[1]), values.mean(0), values.std(0, correction=0)
    figure.add_trace(band(x, (mean - sd).tolist(), (mean + sd).tolist(), name, style), **place)
    add_line(figure, x, mean.tolist(), name, style, hover, sd.tolist(), **place)


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
    """A table of numbers, printed in the cells where they fit; without one a cell is grey.

    Limits that are as far below zero as above make the scale diverge, with white at zero.
    """
    shows_text = values.numel() <= _MAX_CELLS_WITH_TEXT
    rows = gaps(values)
    text = [["" if value is None else number(value, digits) for value in row] for row in rows]
    return go.Heatmap(
        z=rows,
        x=list(x),
        y=list(y),
        colorscale=[list(stop) for stop in (DIVERGING if limits and limits[0] == -limits[1] else SEQUENTIAL)],
        zmin=limits[0] if limits else None,
        zmax=limits[1] if limits else None,
        text=text if shows_text else None,
        texttemplate="%{text}" if shows_text else None,
        textfont={"size": 11, "color": INK},
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


def zero_line(figure: go.Figure, value: float = 0.0, **place: Any) -> None:
    """A thin horizontal line."""
    figure.add_hline(value, line={"color": MUTED, "width": 1}, **place)


def cut_line(figure: go.Figure, value: int | float, **place: Any) -> None:
    """A dotted vertical line."""
    figure.add_vline(value, line={"color": INK, "width": 1, "dash": "dot"}, **place)


def _faint(color: str) -> str:
    red, green, blue = _parts(color)
    return f"rgba({red},{green},{blue},0.14)"


def _tint(color: str) -> str:
    red, green, blue = (255 - (255 - part) * 4 // 10 for part in _parts(color))
    return f"rgb({red},{green},{blue})"


def _parts(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]
