"""What directions do to answers and cost in CE loss: rates, losses, combinations, layers and multipliers of CAA."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..measures import ABSweep, LossResult
from ..run.answers import Side, SideEffects
from ..run.combos import CombosResult, ValidationRow
from ..stats import Rate
from .fit import text_width
from .save import save_figure
from .style import CHOSEN, COOL, INK, MUTED, WARM, WIDTH, Look, finish, interval_bars, plain

_NARROW = 360
"""What a single column of panels is laid out for (px)."""
_BAR = 46


def intervention_name(label: str, side: Side) -> str:
    """A published label in words: activation addition subtracts on harmful prompts and adds on harmless ones.

    Examples:
        >>> intervention_name("actadd", "harmful"), intervention_name("actadd", "harmless")
        ('subtracted (−1)', 'added (+1)')
    """
    added = "subtracted (−1)" if side == "harmful" else "added (+1)"
    if label.startswith("random"):
        done = "ablated" if "ablation" in label else added
        return f"random {label.rsplit('_', 1)[-1]} {done}"
    return {"baseline": "plain model", "ablation": "ablated", "actadd": added}.get(label, label)


def plot_rates(
    sides: Sequence[SideEffects], *, model: str = "", columns: Literal[1, 2] = 2, **look: Unpack[Look]
) -> go.Figure:
    """Fraction of answers that refuse and that are degenerate text, with 95% Wilson intervals.

    Examples:
        >>> plot_rates(run.record.sides, width=360, columns=1).layout.width
        360

    Args:
        columns: 1 is for a narrow page, as a width of 360 is.
    """
    if columns == 1:
        look = {"width": _NARROW, **look}
    titles = [
        f"<b>{side.side} prompts</b><br>"
        + ("" if side.set_name == side.side else f"{plain(side.set_name)}, ")
        + f"n = {_n(side)}"
        for side in sides
    ]
    figure = make_subplots(1, max(1, len(sides)), subplot_titles=titles)
    for column, side in enumerate(sides, start=1):
        place = {"row": 1, "col": column}
        for name, shift, marker in _RATES:
            rates = [effect.refusal if name == "refused" else effect.degenerate for effect in side.effects]
            figure.add_trace(_rates(side, name, rates, shift, marker, is_first=column == 1), **place)
        names = [plain(intervention_name(effect.label, side.side)) for effect in side.effects]
        figure.update_xaxes(title="fraction of answers", range=[-0.04, 1.04], tick0=0, dtick=0.25, **place)
        rows = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5]}
        figure.update_yaxes(**rows, showgrid=False, **place)
        for edge in range(1, len(names)):
            figure.add_hline(edge - 0.5, line={"color": MUTED, "width": 0.5}, **place)
    figure.update_annotations(font_size=13)
    return finish(
        figure,
        title="Refusals and degenerate text",
        about=" · ".join(part for part in (plain(model), "with 95% Wilson intervals") if part),
        height=_BAR * max((len(side.effects) for side in sides), default=1) + 24,
        legend_names=["refused", "degenerate text"],
        look=look,
    )


_RATES = (
    ("refused", -0.17, {"symbol": "circle", "size": 11, "color": WARM}),
    ("degenerate text", 0.17, {"symbol": "square-open", "size": 9, "color": INK}),
)
"""Name, place within the row and marker: a rate of zero is seen too."""


_CHANGES = (("#6a3d9a", ""), ("#b5a8cc", ""), ("#ffffff", "/"), ("#ffffff", "."))
_GREYS = (("#d9d9d9", ""), ("#d9d9d9", "/"), ("#d9d9d9", "x"), ("#d9d9d9", "."))
"""Color and hatching of bars of interventions, and of random ones."""


def plot_losses(losses: Mapping[str, Mapping[str, LossResult]], *, model: str = "", **look: Unpack[Look]) -> go.Figure:
    """Change of CE loss from the plain model under each intervention, for each set of texts.

    Examples:
        >>> plot_losses(run.losses).layout.yaxis.title.text
        'change of CE loss (nats per token)'
        >>> [trace.name for trace in plot_losses(run.losses).data]
        ['ablated', 'subtracted (−1)', 'random 0 ablated']

    Args:
        losses: `[label][text set]`; the label `baseline` is the plain model.
    """
    base = losses["baseline"]
    figure, names = go.Figure(), []
    for index, label in enumerate(label for label in losses if label != "baseline"):
        deltas = [losses[label][name].ce_loss - base[name].ce_loss for name in base]
        names.append(plain(intervention_name(label, "harmful")))
        fills = _GREYS if label.startswith("random") else _CHANGES
        color, pattern = fills[index % len(fills)]
        figure.add_trace(
            go.Bar(
                x=[f"{'<br>'.join(plain(name).split('_'))}<br>{base[name].n_tokens:,} tokens" for name in base],
                y=deltas,
                name=names[-1],
                marker={"color": color, "line": {"color": INK, "width": 1}, "pattern": {"shape": pattern}},
                customdata=[[losses[label][name].ce_loss, base[name].ce_loss] for name in base],
                hovertemplate=f"<b>{names[-1]}</b>, %{{x}}<br>%{{customdata[0]:.4f}} against %{{customdata[1]:.4f}}"
                "<br>change %{y:+.4f} nats per token<extra></extra>",
            )
        )
    figure.add_hline(0, line={"color": MUTED, "width": 1})
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_yaxes(title="change of CE loss (nats per token)", tickformat="+.3~f")
    about = " · ".join(part for part in (plain(model), "difference from the plain model") if part)
    return finish(
        figure,
        title="Cost in cross-entropy loss",
        about=about,
        height=320,
        legend_names=names,
        look=look,
    )


def _rates(
    side: SideEffects, name: str, rates: Sequence[Rate], shift: float, marker: dict[str, Any], *, is_first: bool
) -> go.Scatter:
    rows = [
        [plain(intervention_name(effect.label, side.side)), rate.count, rate.n, *rate.interval]
        for effect, rate in zip(side.effects, rates, strict=True)
    ]
    intervals = [(rate.value, *rate.interval) for rate in rates]
    return go.Scatter(
        x=[rate.value for rate in rates],
        y=[row + shift for row in range(len(rates))],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=is_first,
        marker=marker,
        error_x={"type": "data", "symmetric": False, "color": marker["color"], **interval_bars(intervals, 4)},
        customdata=rows,
        hovertemplate=f"<b>%{{customdata[0]}}</b><br>{name}: %{{customdata[1]}} of %{{customdata[2]}} = %{{x:.3f}}"
        "<br>95% interval %{customdata[3]:.3f} to %{customdata[4]:.3f}<extra></extra>",
    )


def _n(side: SideEffects) -> int:
    return side.effects[0].refusal.n if side.effects else 0


Kind = Literal["combination", "random", "plain model"]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
_FILLS = ("#ffffff", "#6a3d9a", "#b5a8cc", "#e9e3f2", "#1a1a1a")
_BESIDE = 130
"""What of a figure's width is not plot, at most (px)."""


@dataclass(frozen=True)
class CombinationPoint:
    """What ablating one combination did on validation prompts.

    Examples:
        >>> CombinationPoint("0-1", "combination", 2, Rate(1, 40), -5.0, 0.1, 2.11, True).group
        '2 directions'
    """

    label: str
    """Its ranks, such as 0-2."""
    kind: Kind
    n_directions: int
    refusal: Rate
    """Of short answers to harmful prompts."""
    bypass: float
    """Mean refusal score (nats) on harmful prompts."""
    kl_nats: float
    ce_loss: float
    """Nats per token."""
    is_allowed: bool
    """Whether its KL is within the limit."""
    is_winner: bool = False
    ce_interval: tuple[float, float] | None = None
    """95% of the change from the plain model on the same texts, at the CE loss that it makes (nats per token)."""

    @property
    def ends(self) -> tuple[float, float]:
        """Of what is drawn of it along the CE loss."""
        return self.ce_interval or (self.ce_loss, self.ce_loss)

    @property
    def group(self) -> str:
        """Its name in the legend."""
        if self.kind != "combination":
            return "random span" if self.kind == "random" else "plain model"
        size = "single direction" if self.n_directions == 1 else f"{self.n_directions} directions"
        return size if self.is_allowed else f"{size}, KL over the limit"


def plot_combos(
    points: Sequence[CombinationPoint],
    *,
    text_set: str,
    kl_max: float | None,
    model: str = "",
    **look: Unpack[Look],
) -> go.Figure:
    """Refusal rate (with 95% Wilson intervals) against CE loss on plain text; the winner is ringed.

    Intervals of the CE loss stand below, a row each: of its change from the plain model, drawn at what it makes.

    Examples:
        >>> points = [
        ...     CombinationPoint("plain", "plain model", 0, Rate(38, 40), 6.0, 0.0, 2.10, True),
        ...     CombinationPoint("0-1", "combination", 2, Rate(1, 40), -5.0, 0.1, 2.11, True, is_winner=True),
        ... ]
        >>> plot_combos(points, text_set="plain_text", kl_max=0.1).layout.title.text
        'Refusal against cost, by ablated directions'

    Args:
        text_set: what the CE loss is measured on.
        kl_max: the limit that decides which combinations may win (nats); None is none.
    """
    figure = go.Figure()
    # Small markers over large ones: of equal points none is hidden.
    groups = list(dict.fromkeys(point.group for point in sorted(points, key=_drawn_before)))
    for group in groups:
        figure.add_trace(_trace(group, [point for point in points if point.group == group]))
    for winner in (point for point in points if point.is_winner):
        ring = {"color": CHOSEN, "size": 22, "symbol": "circle-open", "line": {"width": 3.5}}
        place = {"x": [winner.ce_loss], "y": [winner.refusal.value], "hoverinfo": "skip"}
        groups.append(f"winner, {plain(winner.label)}")
        figure.add_trace(go.Scatter(**place, mode="markers", name=groups[-1], marker=ring))
    _label(figure, points, look.get("width", WIDTH) - _BESIDE)
    figure.update_xaxes(title=f"CE loss on {plain(text_set)} (nats per token)", tickformat=f".{_digits(points)}~f")
    measured = sorted((point for point in points if point.ce_interval is not None), key=lambda each: each.ce_loss)
    rows = {id(point): -0.1 - _ROW * row for row, point in enumerate(measured)}
    for group in groups:
        if below := [point for point in measured if point.group == group]:
            figure.add_trace(_cost(group, below, [rows[id(point)] for point in below]))
    lowest = min(rows.values(), default=0.0) - 0.05
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure.update_yaxes(title="fraction of validation answers that refuse", range=[lowest, 1.07], tickvals=ticks)
    n = points[0].refusal.n if points else 0
    rule = "" if kl_max is None else f"winners need KL ≤ {kl_max:g} nats"
    intervals = "95% intervals" + (", below: of the change of CE loss from the plain model" if measured else "")
    parts = (plain(model), f"n = {n} harmful validation prompts", intervals, rule)
    return finish(
        figure,
        title="Refusal against cost, by ablated directions",
        about=" · ".join(part for part in parts if part),
        height=420 + 11 * len(measured),
        legend_names=groups,
        look=look,
    )


def _drawn_before(point: CombinationPoint) -> int:
    """Order of drawing and in the legend: the plain model, many directions, few, random spans."""
    return {"plain model": -1000, "random": 0}.get(point.kind, -point.n_directions)


def _is_high(point: CombinationPoint) -> bool:
    """Whether its label stands below it."""
    return point.refusal.value > 0.7


def _digits(points: Sequence[CombinationPoint]) -> int:
    """Decimals that tell the losses of an axis apart."""
    losses = [point.ce_loss for point in points]
    spread = max(losses, default=1.0) - min(losses, default=0.0)
    return max(2, 1 - math.floor(math.log10(spread))) if spread > 0 else 3


def _trace(group: str, points: Sequence[CombinationPoint]) -> go.Scatter:
    size = min(points[0].n_directions, len(_SYMBOLS))
    symbol = {"random": "x", "plain model": "star"}.get(points[0].kind, _SYMBOLS[size - 1])
    fill = {"random": MUTED, "plain model": INK}.get(points[0].kind, _FILLS[size % len(_FILLS)])
    if not points[0].is_allowed:
        symbol, fill = f"{symbol}-open", INK
    return go.Scatter(
        x=[point.ce_loss for point in points],
        y=[point.refusal.value for point in points],
        mode="markers",
        text=[plain(point.label) for point in points],
        name=group,
        marker={
            "symbol": symbol,
            "size": 8 + 3 * size if points[0].kind == "combination" else 11,
            "color": fill,
            "line": {"color": INK, "width": 1},
        },
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point.refusal.interval[1] - point.refusal.value for point in points],
            "arrayminus": [point.refusal.value - point.refusal.interval[0] for point in points],
            **_BARS,
        },
        customdata=[[point.refusal.count, point.refusal.n, point.bypass, point.kl_nats] for point in points],
        hovertemplate=f"<b>%{{text}}</b> ({group})<br>refused: %{{customdata[0]}} of %{{customdata[1]}}"
        "<br>refusal score %{customdata[2]:.2f} nats<br>KL %{customdata[3]:.4f} nats"
        "<br>CE loss %{x:.4f} nats per token<extra></extra>",
    )


def _cost(group: str, points: Sequence[CombinationPoint], rows: Sequence[float]) -> go.Scatter:
    """Intervals of the CE loss, each in a row of its own: points without refusals would share one line."""
    trace = _trace(group, points)
    trace.update(y=list(rows), error_y=None, showlegend=False, name=f"{group}, CE loss")
    trace.marker.size = 6
    trace.error_x = {
        "type": "data",
        "symmetric": False,
        "array": [point.ends[1] - point.ce_loss for point in points],
        "arrayminus": [point.ce_loss - point.ends[0] for point in points],
        **_BARS,
    }
    trace.customdata = [list(point.ends) for point in points]
    trace.hovertemplate = (
        f"<b>%{{text}}</b> ({group})<br>CE loss %{{x:.4f}} [%{{customdata[0]:.4f}}, %{{customdata[1]:.4f}}]"
        " nats per token<extra></extra>"
    )
    return trace


_ROW = 0.032
"""Between two of these rows, as a fraction of answers."""
_BARS: dict[str, Any] = {"color": "rgba(107,107,107,0.8)", "thickness": 1, "width": 4}


def _label(figure: go.Figure, points: Sequence[CombinationPoint], width: int) -> None:
    """Name the allowed combinations above their intervals (below, near the top), each clear of its right neighbors."""
    if not points:
        return
    ends = [end for point in points for end in point.ends]
    per_pixel = (max(ends) - min(ends)) / max(width, 100)
    placed: list[tuple[float, bool, int]] = []
    named = [point for point in points if point.kind == "combination" and point.is_allowed]
    # Labels of one side begin at one height, so that levels keep them apart.
    edges = {
        is_high: (min if is_high else max)(
            (each.refusal.interval[0 if is_high else 1] for each in named if _is_high(each) == is_high), default=0.0
        )
        for is_high in (True, False)
    }
    for point in sorted(named, key=lambda each: -each.ce_loss):
        is_high = _is_high(point)
        end = point.ce_loss + per_pixel * (text_width(point.label, 11) + 8)
        level = 1 + max((at for x, side, at in placed if side == is_high and x <= end), default=-1)
        placed.append((point.ce_loss, is_high, level))
        shift = 9 + 14 * level
        figure.add_annotation(
            x=point.ce_loss,
            y=edges[is_high],
            text=plain(point.label),
            ax=0,
            ay=shift if is_high else -shift,
            xanchor="left",
            font={"size": 11, "color": MUTED},
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor="rgba(107,107,107,0.4)",
            borderpad=0,
        )


_STYLES = {1: (WARM, "solid", "circle"), -1: (COOL, "6px,2px", "square")}


def plot_layer_sweep(
    sweep: ABSweep, *, model: str = "", multipliers: tuple[float, ...] = (1.0, -1.0), **look: Unpack[Look]
) -> go.Figure:
    """Change of p(matching answer) against CAA's layer, one line per multiplier, with 95% intervals.

    Examples:
        >>> point = ABPoint(2, 1.0, p=0.5, low=0.4, high=0.6, delta=0.1, delta_low=0.0, delta_high=0.2, n_pairs=9)
        >>> figure = plot_layer_sweep(ABSweep("held-out pairs", 0.4, (point,), 9))
        >>> figure.layout.xaxis.title.text, figure.layout.yaxis.title.text
        ('layer (output of block)', 'change of p(matching answer)')
    """
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
    figure.update_xaxes(title="layer (output of block)", tick0=0, dtick=1)
    figure.update_yaxes(title="change of p(matching answer)")
    n = sweep.points[0].n_pairs if sweep.points else 0
    parts = [plain(model), f"{plain(sweep.pairs)}, n = {n} pairs", f"plain p = {sweep.plain:.3f}", "95% intervals"]
    return finish(
        figure,
        title="Change of p(matching answer) by layer of the steering vector",
        about=" · ".join(part for part in parts if part),
        height=380,
        legend_names=names,
        look=look,
    )


def draw_combos(result: CombosResult, folder: Path) -> None:
    """`combos.html` from what `combos.json` holds."""
    limit = result.options.kl_max
    figure = plot_combos(combination_points(result), text_set=result.text_set, kl_max=limit, model=result.model.name)
    save_figure(figure, folder / "combos.html")


def combination_points(result: CombosResult) -> list[CombinationPoint]:
    """The points of the figure: the plain model, every combination, random spans."""
    kl_max = result.options.kl_max

    def point(row: ValidationRow, kind: Kind, n: int = 1) -> CombinationPoint:
        loss = row.ce_loss[result.text_set]
        interval = None
        if loss.change is not None:
            at, low, high = loss.change
            interval = loss.ce_loss - at + low, loss.ce_loss - at + high
        return CombinationPoint(
            row.label,
            kind,
            n,
            row.refusal,
            row.bypass,
            row.kl_nats,
            loss.ce_loss,
            is_allowed=kind != "combination" or kl_max is None or row.kl_nats <= kl_max,
            is_winner=row.label == result.winner,
            ce_interval=interval,
        )

    plain_model = [] if result.baseline is None else [point(result.baseline, "plain model")]
    combined = [point(row.measured, "combination", len(row.combination.ranks)) for row in result.combinations]
    return [*plain_model, *combined, *(point(row, "random") for row in result.random)]
