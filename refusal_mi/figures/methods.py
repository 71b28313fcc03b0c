"""One direction or several: refusals against cost of every method, the cost at equal refusal, and what else changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Unpack, runtime_checkable

import plotly.graph_objects as go

from ..errors import UserError
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
    def kl_nats(self) -> float | None: ...
    @property
    def refused(self) -> float | None: ...


@runtime_checkable
class OverDraws(Protocol):
    """A method found again from drawn training prompts."""

    @property
    def label(self) -> str: ...
    @property
    def over(self) -> str: ...
    @property
    def ratios(self) -> Sequence[float | None]: ...


@runtime_checkable
class OfSet(Protocol):
    """What is refused of a set of harmless prompts."""

    @property
    def set_name(self) -> str: ...
    @property
    def change(self) -> Mapping[str, float | int]: ...


@runtime_checkable
class OfTask(Protocol):
    """What a task loses."""

    @property
    def task(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def change(self) -> tuple[float, float | None, float | None]: ...


@runtime_checkable
class BesideIt(Protocol):
    """What a removal does where nothing harmful is asked."""

    @property
    def label(self) -> str: ...
    @property
    def over_refusal(self) -> Sequence[OfSet]: ...
    @property
    def capability(self) -> Sequence[OfTask]: ...


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
    @property
    def kl_tokens(self) -> int: ...
    @property
    def draws(self) -> Sequence[OverDraws]: ...


@runtime_checkable
class Beside(Protocol):
    """What the figure of over-refusal and tasks shows."""

    @property
    def beside(self) -> Sequence[BesideIt]: ...
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
    figure.update_xaxes(
        title=f"KL of harmless prompts over {_tokens(found)} (nats)", type="log", dtick=1, exponentformat="e"
    )
    figure.update_yaxes(title="harmful prompts refused, share", range=[-0.04, 1.04])
    about = draw.subtitle(model, f"{found.n_held_out} held-out prompts a side", "the line across: refusals to match")
    return draw.finish(figure, title="Refusals and cost of methods", about=about, height=400, look=look)


def plot_ratios(found: Compared, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """KL of every method over that of one difference of means, where both leave as many refusals.

    Beside them random subspaces, which stop none: whole, over the same. Where training prompts were drawn again, a tick
    for each draw.
    """
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
    reference = found.rows[0]
    drawn = [each for each in found.draws if each.over == reference.label and plain(each.label) in names]
    ticks_of = [(plain(each.label), ratio) for each in drawn for ratio in each.ratios if ratio is not None]
    figure.add_trace(
        go.Scatter(
            x=[value for _, value, _, _ in reached],
            y=names,
            mode="markers",
            name="all training prompts",
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
    if ticks_of:
        figure.add_trace(
            go.Scatter(
                x=[ratio for _, ratio in ticks_of],
                y=[name for name, _ in ticks_of],
                mode="markers",
                name="each draw of training prompts",
                marker={"symbol": "line-ns-open", "size": 14, "color": draw.ACCENT},
                hovertemplate="%{y}, a draw<br>%{x:.2f}",
            )
        )
    cost = reference.matched.kl_nats
    whole = [(each, each.kl_nats / cost) for each in found.controls if cost and each.label == "random"]
    figure.add_trace(
        go.Scatter(
            x=[ratio for _, ratio in whole],
            y=[f"random:{each.k}" for each, _ in whole],
            mode="markers",
            name="random subspace (control), whole: not at equal refusal",
            text=[f"{each.refused_by_score:.3f} refused by score" for each, _ in whole],
            hovertemplate="%{y}<br>%{x:.2f}<br>%{text}",
            marker={"symbol": "x-thin", "color": draw.CONTROL.color, "size": 8, "line": {"width": 1.5}},
        )
    )
    names += dict.fromkeys(f"random:{each.k}" for each, _ in whole)
    figure.add_vline(1, line={"color": draw.MUTED, "dash": "dash"})
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    figure.update_xaxes(title=f"KL / KL of one difference of means, over {_tokens(found)}", type="log")
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    notes = [f"{found.n_held_out} held-out prompts a side, 95% intervals"]
    notes += [f"open: no bounds ({', '.join(open_ended)})"] if open_ended else []
    notes += [f"matched at more refusals: {', '.join(at_more)}"] if at_more else []
    notes += [f"never fewer refusals: {', '.join(never)}"] if never else []
    about = draw.subtitle(model, *notes)
    height = 80 + 24 * len(names)
    return draw.finish(figure, title="Cost at equal refusal", about=about, height=height, look=look)


def plot_beside(found: Beside, *, model: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """Change of refusals of harmless prompts, and of tasks, under every method where it is matched, and under controls.

    Raises:
        UserError: the file is of before this was measured.
    """
    if len(found.beside) < 2:
        raise UserError("over-refusal was not measured: run compare-methods again, which keeps what is done")
    _, *rows = found.beside
    names = [plain(row.label) for row in rows]
    changes = [
        (f"{plain(each.set_name)}: refused", [_limits(row.over_refusal[index].change) for row in rows])
        for index, each in enumerate(rows[0].over_refusal)
    ]
    changes += [
        (f"{plain(each.task)}: {plain(each.metric)}", [row.capability[index].change for row in rows])
        for index, each in enumerate(rows[0].capability)
    ]
    figure = draw.panels([title for title, _ in changes], gap=0.03)
    is_control = [row.label.startswith("random:") for row in rows]
    for column, (_, values) in enumerate(changes, start=1):
        for flag, name in ((False, "method, where matched, or whole"), (True, "random subspace (control), whole")):
            some = [
                (each, value) for each, value, control in zip(names, values, is_control, strict=True) if control is flag
            ]
            style = draw.CONTROL if flag else draw.other_style(0)
            figure.add_trace(_changes(some, name, style), row=1, col=column)
        figure.add_vline(0, line={"color": draw.MUTED, "dash": "dash"}, row=1, col=column)
    figure.update_xaxes(title="change from the plain model")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], automargin=True)
    about = draw.subtitle(model, "paired, 95% intervals", "the line: no change")
    height = 90 + 24 * len(names)
    return draw.finish(figure, title="Over-refusal and tasks", about=about, height=height, look=look)


def _tokens(found: Compared) -> str:
    return "1 token" if found.kl_tokens == 1 else f"{found.kl_tokens} tokens"


def _limits(change: Mapping[str, float | int]) -> tuple[float, float | None, float | None]:
    return change["difference"], change["low"], change["high"]


def _changes(
    rows: Sequence[tuple[str, tuple[float, float | None, float | None]]], name: str, style: draw.SeriesStyle
) -> go.Scatter:
    known = [(value, value if low is None else low, value if high is None else high) for _, (value, low, high) in rows]
    return go.Scatter(
        x=[value for value, _, _ in known],
        y=[label for label, _ in rows],
        mode="markers",
        name=name,
        marker={"color": style.color, "size": 8, "symbol": style.symbol},
        error_x={"type": "data", "symmetric": False, "color": style.color, **draw.interval_bars(known, 3)},
        hovertemplate="%{y}<br>%{x:+.3f}",
    )


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
