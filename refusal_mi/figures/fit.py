"""A finished figure laid out for a width: its words are measured; what does not fit is wrapped, stacked or thinned."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from ..errors import UserError

Pixels = int | float
BASE = 13
"""Size (px) of the font that all lengths here are said for."""
_TITLE, _ABOUT, _SMALL = 17 / BASE, 12 / BASE, 11 / BASE
_LINE = 1.32
"""Height of a line, in font sizes."""
_LEAST_PANEL = 175
"""Panels beside each other are at least this wide (px)."""
_LEAST_HEIGHT = 60
_LEAST_TEXT = 7.5
"""Numbers in the cells of a table are at least this large (px)."""
_WELL = 0.05
"""Share of the scale from which on a number is told from zero."""
_COLORBAR = 62
_UNITS = re.compile(r"<[^>]+>|&[^;\s]+;|.", re.DOTALL)


def text_width(text: str, size: Pixels) -> float:
    """Width (px) of the longest line of a label in a wide font of this size, tags left out."""
    lines = re.split(r"<br>", text)
    return float(size * max(sum(map(_unit_width, _UNITS.findall(line))) for line in lines))


def _unit_width(unit: str) -> float:
    """Of one character, entity or tag, in font sizes (DejaVu Sans, the widest of the stack, and bold a little more)."""
    if unit[0] == "<" and len(unit) > 1:
        return 0.0
    character = html.unescape(unit)[:1]
    if character in " .,:;|!'ilIjtfr·()[]":
        return 0.42
    if character in "mwMWQO@%‖⟨⟩→…" or ord(character) > 0x2E7F:
        return 1.02
    return 0.72 if character.isupper() or ord(character) > 0x2000 else 0.635


def wrapped(text: str, width: Pixels, size: Pixels) -> str:
    """A label in lines that are no wider than `width` (px).

    Lines break at spaces, and inside a word only where it alone is too wide.
    """
    lines: list[str] = []
    for line in text.split("<br>"):
        current = ""
        for word in line.split(" "):
            joined = f"{current} {word}" if current else word
            if text_width(joined, size) <= width or not joined:
                current = joined
                continue
            if current:
                lines.append(current)
            *full, current = _pieces(word, width, size)
            lines += full
        lines.append(current)
    return "<br>".join(lines)


def _pieces(word: str, width: Pixels, size: Pixels) -> list[str]:
    pieces = [""]
    for unit in _UNITS.findall(word):
        if pieces[-1] and text_width(pieces[-1] + unit, size) > width:
            pieces.append("")
        pieces[-1] += unit
    return pieces


@dataclass(frozen=True)
class _Panel:
    """One pair of axes, where it stands in the grid as it was made."""

    x: str
    y: str
    row: int
    column: int


@dataclass
class _Place:
    """A panel's size and the room that its words need (px)."""

    panel: _Panel
    title: int | None
    """Index of its title among the annotations."""
    width: Pixels = 0.0
    height: Pixels = 0.0
    left: float = 0.0
    above: float = 0.0
    below: float = 0.0


def prepared(
    figure: go.Figure,
    *,
    title: str,
    about: str,
    names: Sequence[str],
    width: int,
    is_fixed: bool,
    fixed_height: int | None,
    height: int,
    font_size: Pixels,
) -> go.Figure:
    """Keep in a figure what `laid_out` starts from; the arguments are those of `style.finish`."""
    layout = figure.layout.to_plotly_json()
    kept = {name: value for name, value in layout.items() if name not in ("template", "meta")}
    spec = {
        "title": title,
        "about": about,
        "names": list(names),
        "width": width,
        "is_fixed": is_fixed,
        "fixed_height": fixed_height,
        "height": height,
        "font_size": font_size,
        "layout": kept,
        "numbers": [_printed(trace) for trace in figure.data],
    }
    return figure.update_layout(meta={"refusal_mi": spec})


def _printed(trace: Any) -> list[list[str]] | None:
    """What a table prints in its cells."""
    if trace.type != "heatmap" or trace.text is None or trace.texttemplate is None:
        return None
    return [[str(text) for text in row] for row in trace.text]


def laid_out(figure: go.Figure, *, width: int | None = None, height: int | None = None) -> go.Figure:
    """Lay a finished figure out again, in place, for a width and a height (px); None is what it was finished with.

    A figure that the package did not finish stays as it is.

    Raises:
        UserError: the height leaves no room for the plot.
    """
    spec = (figure.layout.meta or {}).get("refusal_mi") if isinstance(figure.layout.meta, dict) else None
    if spec is None:
        return figure
    width = spec["width"] if width is None else width
    height = spec["fixed_height"] if height is None else height
    template = figure.layout.template
    figure.layout = spec["layout"]
    figure.update_layout(template=template, meta={"refusal_mi": spec})
    size = spec["font_size"]
    panels = _panels(figure)
    titles = {index: _titled(figure, note, panels) for index, note in enumerate(figure.layout.annotations)}
    places = [_Place(panel, next((i for i, at in titles.items() if at is panel), None)) for panel in panels]
    right = _right(figure, size, spec["height"])
    n_columns = _shape_(figure, places, width, right, size, spec["height"])
    rows = [places[start : start + n_columns] for start in range(0, len(places), n_columns)]
    top = _head_(figure, spec, width, size)
    bottom = _legend_(figure, spec["names"], width, width - right - max(row[0].left for row in rows), size)
    for place in places:
        _words_(figure, place, size, stacks=n_columns == 1 and len(places) > 1)
    needed = [(max(p.above for p in row), max(p.height for p in row), max(p.below for p in row)) for row in rows]
    words = top + bottom + sum(above + below for above, _, below in needed)
    plotted = sum(high for _, high, _ in needed)
    scale = 1.0 if height is None else (height - words) / plotted
    if min(high for _, high, _ in needed) * scale < min(_LEAST_HEIGHT, *(high for _, high, _ in needed)):
        least = round(words + _LEAST_HEIGHT * len(rows))
        raise UserError(f"a height of {height} px leaves no room for this figure at a width of {width} px: {least} do")
    _domains_(figure, rows, needed, width, right, scale)
    left = max(row[0].left for row in rows)
    total = words + plotted * scale
    top_margin, bottom_margin = top + needed[0][0], bottom + needed[-1][2]
    figure.update_layout(
        height=round(total), margin={"l": left, "r": right, "t": top_margin, "b": bottom_margin, "autoexpand": False}
    )
    if spec["is_fixed"] or width != spec["width"]:
        figure.update_layout(width=width)
    for place in places:
        _cells_(figure, spec, place, size, scale)
    return figure


def _panels(figure: go.Figure) -> list[_Panel]:
    """Every pair of axes that something is drawn on, row by row."""
    pairs = dict.fromkeys((_axis(trace.xaxis, "x"), _axis(trace.yaxis, "y")) for trace in figure.data)
    found = list(pairs) or [("xaxis", "yaxis")]
    starts = sorted({round(_domain(figure, x)[0], 6) for x, _ in found})
    tops = sorted({round(_domain(figure, y)[1], 6) for _, y in found}, reverse=True)
    places = [
        _Panel(x, y, tops.index(round(_domain(figure, y)[1], 6)), starts.index(round(_domain(figure, x)[0], 6)))
        for x, y in found
    ]
    return sorted(places, key=lambda panel: (panel.row, panel.column))


def _axis(name: str | None, letter: str) -> str:
    return f"{letter}axis{(name or letter)[1:]}"


def _domain(figure: go.Figure, axis: str) -> tuple[float, float]:
    return tuple(figure.layout[axis].domain or (0.0, 1.0))  # type: ignore[return-value]


def _titled(figure: go.Figure, note: Any, panels: Sequence[_Panel]) -> _Panel | None:
    """The panel whose title an annotation is."""
    if (note.xref, note.yref, note.yanchor) != ("paper", "paper", "bottom"):
        return None
    for panel in panels:
        low, high = _domain(figure, panel.x)
        if abs(note.x - (low + high) / 2) < 1e-6 and abs(note.y - _domain(figure, panel.y)[1]) < 1e-6:
            return panel
    return None


def _right(figure: go.Figure, size: Pixels, height: Pixels) -> float:
    """The right margin: a colorbar, its numbers and its title."""
    bars = [trace.colorbar for trace in figure.data if trace.type == "heatmap" and trace.showscale is not False]
    if not bars:
        return 18.0
    lines = max(_bar_title(bar, size, height).count("<br>") for bar in bars) + 1
    return _COLORBAR * size / BASE + 12 + lines * _LINE * _ABOUT * size


def _bar_title(bar: Any, size: Pixels, height: Pixels) -> str:
    """The title of a colorbar in lines as long as it is in a plot of this height."""
    text = (bar.title.text or "").replace("<br>", " ")
    return wrapped(text, max(height * (bar.len or 1.0), 120), _ABOUT * size)


def _shape_(figure: go.Figure, places: list[_Place], width: Pixels, right: Pixels, size: Pixels, height: Pixels) -> int:
    """Widths, heights and left margins of the panels, side by side or, where they would be thin, below each other."""
    grid = {"rows": 1 + max(p.panel.row for p in places), "columns": 1 + max(p.panel.column for p in places)}
    spans = [high - low for low, high in (_domain(figure, p.panel.y) for p in places)]
    for place, span in zip(places, spans, strict=True):
        place.height = height * span / (max(spans) * grid["rows"])
        place.left = _left(figure, place, width, size, is_first=place.panel.column == 0)
    columns = [[p for p in places if p.panel.column == column] for column in range(grid["columns"])]
    lefts = [max(p.left for p in column) for column in columns]
    shares = [_domain(figure, column[0].panel.x)[1] - _domain(figure, column[0].panel.x)[0] for column in columns]
    room = width - right - sum(lefts) - 12 * (len(columns) - 1)
    widths = [room * share / sum(shares) for share in shares]
    if len(columns) == 1 or min(widths) >= _LEAST_PANEL * size / BASE:
        for column, left, wide in zip(columns, lefts, widths, strict=True):
            for place in column:
                place.left, place.width = left, wide
        return len(columns)
    places.sort(key=lambda p: (p.panel.column, p.panel.row))
    first = {p.panel.row: p.panel for p in places if p.panel.column == 0}
    for place in places:
        axis, model = figure.layout[place.panel.y], figure.layout[first[place.panel.row].y]
        if axis.title.text is None and model.title.text is not None:
            axis.title.text = model.title.text
        for key in ("ticktext", "tickvals", "categoryarray"):
            if axis[key] is None:
                axis[key] = model[key]
        axis.showticklabels = True
        place.left = _left(figure, place, width, size, is_first=True)
    left = max(p.left for p in places)
    for place in places:
        place.left, place.width = left, width - right - left
    return 1


def _left(figure: go.Figure, place: _Place, width: Pixels, size: Pixels, *, is_first: bool) -> float:
    """Room left of a panel for the labels and the title of its y axis; both are wrapped to what there is."""
    axis = figure.layout[place.panel.y]
    title = 0.0
    if axis.title.text:
        axis.title.text = wrapped(axis.title.text, max(place.height, 120), size)
        title = (1 + axis.title.text.count("<br>")) * _LINE * size + 6
    if axis.showticklabels is False or (axis.matches and not is_first and axis.showticklabels is None):
        return 6 + title
    labels = _labels(figure, place.panel, "y")
    if labels is None:
        return (14 if is_first else 10) + title + 3.4 * size
    texts = [wrapped(text, max(0.3 * width, 100), size) for _, text in labels]
    axis.tickvals, axis.ticktext = [value for value, _ in labels], texts
    n_lines = max((1 + text.count("<br>") for text in texts), default=1)
    if n_lines > 1:  # long names are worth the room; numbers of layers are left out instead
        place.height = max(place.height, n_lines * _LINE * size * len(texts))
    each = max(1, math.ceil(_LINE * size * n_lines / (place.height / max(1, len(texts))) - 1e-9))
    if each > 1:
        axis.tickvals, axis.ticktext = axis.tickvals[::each], texts[::each]
    return 14 + title + max((text_width(text, size) for text in texts), default=0.0)


def _labels(figure: go.Figure, panel: _Panel, letter: str) -> list[tuple[Any, str]] | None:
    """Values and texts of an axis whose labels are words; None where they are numbers of a scale."""
    axis = figure.layout[panel.x if letter == "x" else panel.y]
    if axis.ticktext is not None:
        return list(zip(axis.tickvals, axis.ticktext, strict=True))
    values: dict[Any, None] = {}
    for trace in figure.data:
        if (_axis(trace.xaxis, "x"), _axis(trace.yaxis, "y")) == (panel.x, panel.y):
            found = getattr(trace, letter, None)
            values |= dict.fromkeys(() if found is None else found)
    if axis.type == "category" or (values and all(isinstance(value, str) for value in values)):
        return [(value, str(value)) for value in values]
    return None


def _head_(figure: go.Figure, spec: dict[str, Any], width: Pixels, size: Pixels) -> float:
    """Wrap the title and what stands under it; the room that they take."""
    room = width - 28
    title = wrapped(spec["title"], room, _TITLE * size)
    about = wrapped(spec["about"], room, _ABOUT * size)
    figure.update_layout(title_text=title, title_subtitle_text=about)
    lines = [_TITLE * (1 + title.count("<br>"))] * bool(title) + [_ABOUT * (1 + about.count("<br>"))] * bool(about)
    return 16 + sum(lines) * _LINE * size + 8 * len(lines)


def _legend_(figure: go.Figure, names: Sequence[str], width: Pixels, plot_width: Pixels, size: Pixels) -> float:
    """Wrap the names in the legend and set its columns; the room that it takes below the axes.

    Plotly lets a legend of several columns be as wide as the plot is.
    """
    room, symbol = width - 24, 48
    shown = [trace for trace in figure.data if trace.name is not None]
    for trace in shown:
        trace.name = wrapped(trace.name.replace("<br>", " "), room - symbol, size)
    wrapped_names = [wrapped(name, room - symbol, size) for name in names]
    if not names:
        return 8.0
    longest = max(text_width(name, size) for name in wrapped_names)
    columns = max(1, int(plot_width // (longest + symbol)))
    lines = max(1 + name.count("<br>") for name in wrapped_names)
    figure.update_layout(
        legend={"entrywidth": longest + 2, "entrywidthmode": "pixels", "xref": "container", "x": 8 / width},
    )
    return math.ceil(len(names) / columns) * (lines * _LINE * size + 4) + 18


def _words_(figure: go.Figure, place: _Place, size: Pixels, *, stacks: bool) -> None:
    """Labels and title of a panel's x axis, and the title above it, with the room that they take."""
    axis = figure.layout[place.panel.x]
    if place.title is not None:
        note = figure.layout.annotations[place.title]
        note.text = wrapped(note.text, place.width + 20, size)
        note.font.size = size
        place.above = (1 + note.text.count("<br>")) * _LINE * size + 8
    if axis.title.text:
        axis.title.text = wrapped(axis.title.text, place.width + 20, size)
        place.below = (1 + axis.title.text.count("<br>")) * _LINE * size + 6
    if axis.showticklabels is False and not stacks:
        place.below += 10
        return
    place.below += 12 + _x_labels_(figure, place, size)


def _x_labels_(figure: go.Figure, place: _Place, size: Pixels) -> float:
    """Set the labels of an x axis so that none touches the next; their height."""
    axis, labels = figure.layout[place.panel.x], _labels(figure, place.panel, "x")
    if labels is None:
        axis.tickangle = 0
        _numbers_(figure, place, size)
        return _LINE * size
    if not labels:
        return _LINE * size
    cell = place.width / len(labels)
    axis.tickvals = [value for value, _ in labels]
    texts = [text for _, text in labels]
    is_short = all(text_width(text, size) <= 2.6 * size for text in texts)
    flat = [wrapped(text, cell - 6, size) for text in texts]
    words_fit = all(text_width(word, size) <= cell - 6 for text in texts for word in re.split(r" |<br>", text))
    if is_short or (words_fit and max(text.count("<br>") for text in flat) < 4):
        each = max(1, math.ceil((max(text_width(text, size) for text in texts) + 6) / cell)) if is_short else 1
        shown = texts if is_short else flat
        axis.tickvals, axis.ticktext, axis.tickangle = axis.tickvals[::each], shown[::each], 0
        return max(1 + text.count("<br>") for text in shown) * _LINE * size
    texts = [text.replace("<br>", " ") for text in texts]
    upright = [wrapped(text, 15 * size, size) for text in texts]
    if max(1 + text.count("<br>") for text in upright) * _LINE * size > cell:
        upright, size = texts, max(_SMALL * size, min(size, cell / _LINE))
        axis.tickfont.size = size
    each = max(1, math.ceil(max(1 + text.count("<br>") for text in upright) * _LINE * size / cell))
    axis.tickvals, axis.ticktext, axis.tickangle = axis.tickvals[::each], upright[::each], -90
    return max(text_width(text, size) for text in upright)


def _numbers_(figure: go.Figure, place: _Place, size: Pixels) -> None:
    """Thin the numbers below a panel."""
    axis = figure.layout[place.panel.x]
    values = [
        float(value)
        for trace in figure.data
        if _axis(trace.xaxis, "x") == place.panel.x and getattr(trace, "x", None) is not None
        for value in trace.x
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    low, high = axis.range or (min(values, default=0.0), max(values, default=1.0))
    if axis.dtick is None or axis.type == "log":
        axis.nticks = max(2, int(place.width // (4.6 * size)))
        return
    step, is_whole = axis.dtick, float(axis.dtick).is_integer()
    widest = max(text_width(f"{end:.0f}" if is_whole else f"{end:.1f}0", size) for end in (low, high))
    most = max(2, place.width / (widest + 0.9 * size))
    while (high - low) / step + 1 > most:
        step += axis.dtick if is_whole else step
    axis.dtick = step


def _domains_(
    figure: go.Figure,
    rows: list[list[_Place]],
    needed: list[tuple[float, float, float]],
    width: Pixels,
    right: Pixels,
    scale: Pixels,
) -> None:
    """Put every panel where its words leave it room."""
    left = max(row[0].left for row in rows)
    across = width - right - left
    heights = [high * scale for _, high, _ in needed]
    gaps = [below + above for (_, _, below), (above, _, _) in pairwise(needed)]
    down = sum(heights) + sum(gaps)
    y = down
    for index, row in enumerate(rows):
        x = -left
        for place in row:
            x += place.left
            figure.layout[place.panel.x].domain = (max(0.0, x / across), min(1.0, (x + place.width) / across))
            figure.layout[place.panel.y].domain = (max(0.0, (y - heights[index]) / down), min(1.0, y / down))
            if place.title is not None:
                note = figure.layout.annotations[place.title]
                note.x, note.y = (x + place.width / 2) / across, y / down
            x += place.width + 12
        y -= heights[index] + (gaps[index] if index < len(gaps) else 0.0)


def _cells_(figure: go.Figure, spec: dict[str, Any], place: _Place, size: Pixels, scale: Pixels) -> None:
    """Print the numbers of a table where they fit into its cells, or else a minus where a number is below zero."""
    for index, trace in enumerate(figure.data):
        where = _axis(trace.xaxis, "x"), _axis(trace.yaxis, "y")
        if trace.type != "heatmap" or where != (place.panel.x, place.panel.y):
            continue
        bar = trace.colorbar
        bar.x, bar.title.font.size, bar.tickfont.size = 1, _ABOUT * size, _SMALL * size
        bar.title.text = _bar_title(bar, size, spec["height"])
        cell = place.width / max(1, len(trace.x)), place.height * scale / max(1, len(trace.y))
        numbers = spec["numbers"][index]
        longest = max((text_width(text, 1.0) for row in numbers or () for text in row), default=math.inf)
        fitting = min(_SMALL * size, (cell[0] - 6) / max(longest, 0.1), cell[1] / 1.25)
        if fitting >= _LEAST_TEXT:
            trace.text, trace.textfont.size, trace.texttemplate = numbers, fitting, "%{text}"
            continue
        fitting = max(_LEAST_TEXT, min(_SMALL * size, cell[0] / 0.8, cell[1] / 1.25))
        across, down = (math.ceil(fitting * part / side - 1e-9) for part, side in zip((0.8, 1.25), cell, strict=True))
        signs = _signs(trace, across, down)
        trace.text, trace.texttemplate = (signs, "%{text}") if any(map(any, signs)) else (None, None)
        trace.textfont.size = fitting


def _signs(trace: Any, columns: int, rows: int) -> list[list[str]]:
    """A minus in each cell well below zero, of a scale that diverges: the two sides differ in a grey copy too.

    Args:
        columns: and `rows`: of so many that have no room for more, one has a sign.
    """
    if trace.zmin is None or trace.zmin != -trace.zmax:
        return []
    limit = -_WELL * trace.zmax
    return [
        [
            "−" if value is not None and value < limit and not (index % rows or column % columns) else ""
            for column, value in enumerate(row)
        ]
        for index, row in enumerate(trace.z)
    ]
