"""One direction or several: refusals against cost of every method, and the cost at equal refusal."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, Unpack, runtime_checkable

import plotly.graph_objects as go

from ..stats import Rate
from . import style as draw
from .text import plain

_LEAST_KL = 1e-6
"""Where the logarithmic axis of KL ends."""


@runtime_checkable
class At(Protocol):
    """A method at one strength."""

    @property
    def strength(self) -> float: ...
    @property
    def refused(self) -> Rate: ...
    @property
    def kl_nats(self) -> tuple[float, float, float]: ...


@runtime_checkable
class AtMatch(Protocol):
    """A method where it leaves as many refusals as the reference."""

    @property
    def ratio(self) -> tuple[float | None, float | None, float | None]: ...
    @property
    def refused(self) -> float | None: ...


@runtime_checkable
class Method(Protocol):
    """A method in the figures."""

    @property
    def label(self) -> str: ...
    @property
    def curve(self) -> Sequence[At]: ...
    @property
    def matched(self) -> AtMatch: ...


@runtime_checkable
class Control(Protocol):
    """A subspace that no method chose."""

    @property
    def label(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def refused_by_score(self) -> float: ...
    @property
    def kl_nats(self) -> float: ...


@runtime_checkable
class Compared(Protocol):
    """What the figures show."""

    @property
    def rows(self) -> Sequence[Method]: ...
    @property
    def controls(self) -> Sequence[Control]: ...
    @property
    def target(self) -> float: ...
    @property
    def n_held_out(self) -> int: ...


def plot_cost(found: Compared, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """Share of refused short answers against KL on held-out prompts: a line for each method, over strengths."""
    figure, styles = go.Figure(), _styles([row.label for row in found.rows])
    for row, style in zip(found.rows, styles, strict=True):
        points = [each for each in row.curve if each.strength > 0]
        trace = draw.line(
            [max(each.kl_nats[0], _LEAST_KL) for each in points],
            [each.refused.value for each in points],
            plain(row.label),
            style,
            text=[f"strength {each.strength:g}" for each in points],
            hovertemplate="%{text}<br>KL %{x:.5f} nats<br>refused %{y:.3f}",
        )
        figure.add_trace(trace)
    symbols = {"random": "x-thin", "within harmful": "circle-open", "within harmless": "square-open"}
    for name in dict.fromkeys(each.label for each in found.controls):
        controls = [each for each in found.controls if each.label == name]
        figure.add_trace(
            go.Scatter(
                x=[max(each.kl_nats, _LEAST_KL) for each in controls],
                y=[each.refused_by_score for each in controls],
                mode="markers",
                name=f"{name} (control, by score)",
                text=[f"{each.k} directions" for each in controls],
                hovertemplate="%{text}<br>KL %{x:.5f} nats<br>refused %{y:.3f}",
                marker={"symbol": symbols.get(name, "x-thin"), "color": "#8a8a8a", "size": 8, "line": {"width": 1.5}},
            )
        )
    draw.zero_line(figure, found.target)
    figure.update_xaxes(title="KL of harmless prompts (nats)", type="log", dtick=1, exponentformat="e")
    figure.update_yaxes(title="harmful prompts refused, share", range=[-0.04, 1.04])
    about = draw.subtitle(model, f"{found.n_held_out} held-out prompts a side", "the line across: refusals to match")
    return draw.finish(figure, title="Refusals and cost of methods", about=about, height=400, look=look)


def plot_ratios(found: Compared, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """KL of every method over that of one difference of means, where both leave as many refusals."""
    there = [(row, row.matched.ratio) for row in found.rows[1:]]
    reached = [(plain(row.label), value, low, high) for row, (value, low, high) in there if value is not None]
    open_ended = [name for name, _, low, high in reached if low is None or high is None]
    never = [plain(row.label) for row, (value, _, _) in there if value is None]
    at_more = [
        f"{plain(row.label)} ({row.matched.refused:.2f})"
        for row, (value, _, _) in there
        if value is not None and row.matched.refused is not None and row.matched.refused > found.target
    ]
    figure, names = go.Figure(), [name for name, *_ in reached]
    figure.add_trace(
        go.Scatter(
            x=[value for _, value, _, _ in reached],
            y=names,
            mode="markers",
            marker={
                "size": 9,
                "color": draw.INK,
                "symbol": ["circle-open" if name in open_ended else "circle" for name in names],
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [0 if high is None else high - value for _, value, _, high in reached],
                "arrayminus": [0 if low is None else value - low for _, value, low, _ in reached],
                "color": draw.INK,
            },
            hovertemplate="%{y}<br>%{x:.2f}",
        )
    )
    figure.add_vline(1, line={"color": draw.MUTED, "dash": "dash"})
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    figure.update_xaxes(title="KL / KL of one difference of means, at equal refusal", type="log")
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    notes = [f"{found.n_held_out} held-out prompts a side, 95% intervals"]
    notes += [f"open: no bounds ({', '.join(open_ended)})"] if open_ended else []
    notes += [f"matched at more refusals: {', '.join(at_more)}"] if at_more else []
    notes += [f"never fewer refusals: {', '.join(never)}"] if never else []
    about = draw.subtitle(model, *notes)
    height = 80 + 24 * len(names)
    return draw.finish(figure, title="Cost at equal refusal", about=about, height=height, legend_names=[], look=look)


def _styles(labels: Sequence[str]) -> list[draw.SeriesStyle]:
    """A colour and symbol for each method, a dash for each number of directions: "peel:2"."""
    names = list(dict.fromkeys(label.rpartition(":")[0] for label in labels))
    of_name = dict(zip(names, draw.series_styles(len(names)), strict=True))
    dashes = ("solid", "dash", "dot", "dashdot")
    found = []
    for label in labels:
        name, _, k = label.rpartition(":")
        dash = dashes[(int(k) - 1) % len(dashes)] if k.isdecimal() else "solid"
        found.append(replace(of_name[name], dash=dash))
    return found
