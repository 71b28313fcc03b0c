"""The same requests in other wordings: refusals, the direction in the stream, what the heads read."""

from collections.abc import Mapping, Sequence
from typing import Unpack

import plotly.graph_objects as go

from ..run.variants import Interval, VariantsResult, Wording
from ..stats import Rate
from . import style as draw
from .text import plain

_COLORS = ("#6a3d9a", "#00796b", "#9a6b00", "#2f75b5", "#a8327e", "#5b7f00", "#8c1c13")
_DASHES = ("6px,2px", "6px,2px,2px,2px", "9px,3px")
_SYMBOLS = ("triangle-up", "triangle-down", "hexagon", "square", "cross")
_WORDING = {"context": "what precedes", "variant": "variant", "instruction": "instruction", "template": "template"}


def plot_variants(found: VariantsResult, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """Mean projection on the direction by layer, at the direction's own position, of every wording, on both sides.

    Bands are 95% intervals. Dotted lines are the controls of as many tokens; grey is a random direction.

    Examples:
        >>> plot_variants(worded).layout.title.text
        'Where a wording moves the direction'
    """
    slot, sides = found.slot, list(found.plain)
    figure = draw.panels([f"{side} requests" for side in sides], gap=0.03)
    for column, side in enumerate(sides, start=1):
        place = {"row": 1, "col": column}
        given = {"plain": found.plain[side], **{row.name: row.sides[side].given for row in found.rows}}
        for (name, wording), style in zip(given.items(), _styles(len(given)), strict=True):
            _line(figure, wording.projections[slot], plain(name), style, place)
        for row, style in zip(found.rows, _styles(len(given))[1:], strict=True):
            values = [mean for mean, _, _ in row.sides[side].control.projections[slot]]
            dotted = draw.SeriesStyle(style.color, "1px,2px", style.symbol)
            name = f"{plain(row.name)} (control)"
            hover = f"<b>{name}</b>, layer %{{x}}<br>%{{y:.3f}}<extra></extra>"
            trace = draw.line(range(len(values)), values, name, dotted, hovertemplate=hover, mode="lines")
            figure.add_trace(trace, **place)
        random = [mean for mean, _, _ in found.plain[side].random_projections[slot]]
        hover = "random direction, layer %{x}<br>%{y:.3f}"
        draw.add_line(figure, range(len(random)), random, "random direction, plain", draw.CONTROL, hover, None, **place)
        draw.zero_line(figure, **place)
        draw.cut_line(figure, found.direction_layer, **place)
    draw.layer_axis(figure, "layer")
    figure.update_yaxes(title="⟨x, r̂⟩ (residual stream units)", col=1)
    position = draw.position_label(found.positions[slot], found.position_tokens[slot])
    about = draw.subtitle(model, f"at {position}, r from layer {found.direction_layer} (dotted)", _counts(found))
    return draw.finish(figure, title="Where a wording moves the direction", about=about, height=380, look=look)


def plot_variant_rates(found: VariantsResult, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """Share of refused answers of every wording, on both sides, with 95% intervals.

    Examples:
        >>> plot_variant_rates(worded).layout.xaxis.title.text
        'refused, by text'
    """
    sides = list(found.plain)
    names = ["plain", *(plain(row.name) for row in found.rows)]
    figure = draw.panels([f"{side} requests" for side in sides], gap=0.03)
    for column, side in enumerate(sides, start=1):
        given = [found.plain[side], *(row.sides[side].given for row in found.rows)]
        control = [row.sides[side].control for row in found.rows]
        place = {"row": 1, "col": column}
        figure.add_trace(_rates([each.refused for each in given], names, "as given", draw.INK, "circle"), **place)
        rates = [each.refused for each in control]
        name = "as many tokens of random words"
        figure.add_trace(_rates(rates, names[1:], name, draw.CONTROL.color, "square-open"), **place)
        draw.cut_line(figure, found.plain[side].refused.value, **place)
    figure.update_xaxes(title="refused, by text", range=[-0.04, 1.04])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], automargin=True)
    about = draw.subtitle(model, _counts(found), "95% intervals; dotted: plain")
    height = 90 + 34 * len(names)
    return draw.finish(figure, title="Refusals by wording", about=about, height=height, look=look)


def plot_variant_parts(found: VariantsResult, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """What the heads that write the direction read at the last token of harmful requests, by part of the prompt.

    Examples:
        >>> plot_variant_parts(worded, width=360).layout.width
        360
    """
    titles = ["attention", "written along the direction, all heads"]
    figure = draw.panels(titles, gap=0.1, shares_y=False)
    given = {"plain": found.plain["harmful"], **{row.name: row.sides["harmful"].given for row in found.rows}}
    for index, ((name, wording), style) in enumerate(zip(given.items(), _styles(len(given)), strict=True)):
        for column, values in enumerate((wording.attention, wording.written), start=1):
            figure.add_trace(_bars(wording, values, plain(name), index, style), row=1, col=column)
    figure.update_yaxes(title="attention (fraction)", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title="⟨write, r̂⟩ (residual stream units)", row=1, col=2)
    figure.add_hline(0, line={"color": draw.INK, "width": 1}, row=1, col=2)
    figure.update_xaxes(title="part of the prompt")
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    heads = ", ".join(draw.head_names(found.heads))
    n = f"n = {found.n_prompts['harmful']} harmful prompts, 95% intervals"
    about = draw.subtitle(model, n, f"heads {heads}")
    title = "What is read from the variant, and what from the instruction"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _line(
    figure: go.Figure, values: Sequence[Interval], name: str, style: draw.SeriesStyle, place: Mapping[str, int]
) -> None:
    mean, low, high = (list(each) for each in zip(*values, strict=True))
    layers = range(len(mean))
    figure.add_trace(draw.band(layers, low, high, name, style), **place)
    hover = f"<b>{name}</b>, layer %{{x}}<br>%{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
    draw.add_line(figure, layers, mean, name, style, hover, list(zip(low, high, strict=True)), **place)


def _rates(rates: Sequence[Rate], names: Sequence[str], name: str, color: str, symbol: str) -> go.Scatter:
    intervals = [(each.value, *each.interval) for each in rates]
    return go.Scatter(
        x=[each.value for each in rates],
        y=list(names),
        mode="markers",
        name=name,
        legendgroup=name,
        marker={"size": 9, "color": color, "symbol": symbol},
        error_x={"type": "data", "symmetric": False, "color": color, **draw.interval_bars(intervals, 4)},
        hovertemplate=f"%{{y}}, {name}<br>%{{x:.3f}}<extra></extra>",
    )


def _bars(wording: Wording, values: Mapping[str, Interval], name: str, index: int, style: draw.SeriesStyle) -> go.Bar:
    return go.Bar(
        x=[_WORDING.get(part, part) for part in values],
        y=[mean for mean, _, _ in values.values()],
        error_y=draw.interval_bars(list(values.values()), 3),
        name=name,
        legendgroup=name,
        marker=draw.bars(index, style),
        customdata=[wording.n_tokens[part] for part in values],
        hovertemplate=f"<b>{name}</b>, %{{x}} (%{{customdata:.1f}} tokens)<br>%{{y:.4f}}<extra></extra>",
    )


def _styles(n: int) -> list[draw.SeriesStyle]:
    """The plain requests dark and solid, the variants told apart by color, dash and symbol."""
    first, several = draw.other_style(0), range(n - 1)
    looks = [(_COLORS[at % len(_COLORS)], _DASHES[at % len(_DASHES)], _SYMBOLS[at % len(_SYMBOLS)]) for at in several]
    return [first, *(draw.SeriesStyle(*each) for each in looks)]


def _counts(found: VariantsResult) -> str:
    return draw.counted(found.n_prompts)
