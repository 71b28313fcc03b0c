"""A study: what every method does in every model, beside each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Unpack, runtime_checkable

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import UserError
from . import style as draw
from .text import plain


@runtime_checkable
class Row(Protocol):
    """A number of a study's table, as far as a figure sees it."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def stage(self) -> str | None: ...
    @property
    def method(self) -> str | None: ...
    @property
    def k(self) -> int | None: ...
    @property
    def set(self) -> str | None: ...
    @property
    def metric(self) -> str | None: ...
    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def status(self) -> str: ...


@dataclass(frozen=True)
class _Column:
    metric: str
    title: str
    axis: str
    is_log: bool = False


_COLUMNS = (
    _Column("refused", "Refusals", "harmful prompts refused, share"),
    _Column("kl_ratio", "Cost at equal refusal", "KL / KL of one difference of means", True),
    _Column("ce_change", "Cost on plain texts", "CE change (nats per token)"),
)
_STAGE, _PLAIN, _REFUSES_NOT = "compare-methods", "plain", "does not refuse"
_TICKS = (0.01, 0.1, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 100)


def plot_study(rows: Sequence[Row], *, name: str = "", **look: Unpack[draw.Look]) -> go.Figure:
    """A row of panels for each model, a column for each cost, a line for each method; points with 95% intervals.

    Seeds and sets of prompts are told apart by color and symbol. Of a model that does not refuse, and of a run in
    which no methods were compared, there is the plain rate alone; models that failed are named below the title.

    Args:
        rows: of `study.parquet`, as `studies.table.read_table` gives them.
        name: of the study.

    Raises:
        UserError: no model has numbers.
    """
    drawn = _drawn(rows)
    models = list(dict.fromkeys(each.model for each in drawn))
    if not models:
        raise UserError("this study has no numbers to draw yet")
    columns = [each for each in _COLUMNS if any(row.metric == each.metric for row in drawn)]
    methods = sorted(dict.fromkeys(map(_label, drawn)), key=lambda label: label != _PLAIN)
    series = list(dict.fromkeys((each.data, each.seed) for each in drawn))
    titles = [f"<b>{each.title}</b>" for each in columns]
    figure = make_subplots(
        len(models),
        len(columns),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.02, 0.5 / max(1, len(models) - 1)),
    )
    figure.update_annotations(font_size=13)
    styles = dict(zip(series, draw.series_styles(len(series)), strict=True))
    several = len({data for data, _ in series}) > 1
    for row, model in enumerate(models, start=1):
        for column, shown in enumerate(columns, start=1):
            for index, (of_series, style) in enumerate(styles.items()):
                points = [each for each in drawn if each.model == model and each.metric == shown.metric]
                points = [each for each in points if (each.data, each.seed) == of_series]
                places = [methods.index(_label(each)) + _offset(index, len(series)) for each in points]
                label = f"seed {of_series[1]}" if not several else f"{plain(str(of_series[0]))}, seed {of_series[1]}"
                figure.add_trace(_points(points, places, label, style), row=row, col=column)
            _axes(figure, shown, drawn, row, column, is_last=row == len(models))
        refuses = any(each.status != _REFUSES_NOT for each in drawn if each.model == model)
        title = plain(model) if refuses else f"{plain(model)} ({_REFUSES_NOT})"
        figure.update_yaxes(title=title, row=row, col=1)
    names = [plain(method) for method in methods]
    ends = [len(methods) - 0.5, -0.5]
    figure.update_yaxes(tickvals=list(range(len(methods))), ticktext=names, range=ends, showgrid=False)
    failed = dict.fromkeys(each.model for each in rows if each.status == "failed" and each.model not in models)
    notes = ["points are seeds" if not several else "points are seeds and sets of prompts", "95% intervals"]
    notes += [f"failed: {', '.join(failed)}"] if failed else []
    height = len(models) * (30 + 22 * len(methods))
    about = draw.subtitle(name, *notes)
    return draw.finish(figure, title="Models and methods", about=about, height=height, look=look)


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """The numbers of the methods' comparisons; of a cell without one, how often the plain model refuses."""
    compared = {_cell(each) for each in rows if each.stage == _STAGE}
    found, plain_of = list[Row](), set[tuple[object, ...]]()
    for each in rows:
        if each.value is None:
            continue
        if each.stage == _STAGE:
            found += [] if (each.method or "").startswith("control") else [each]
        elif _is_plain_rate(each) and _cell(each) not in {*compared, *plain_of}:
            plain_of.add(_cell(each))  # the first: a run has others, of other prompts
            found.append(each)
    return found


def _cell(row: Row) -> tuple[object, ...]:
    return row.model, row.data, row.seed


def _is_plain_rate(row: Row) -> bool:
    return row.method == _PLAIN and row.metric == "refused" and (row.set or "").startswith("harmful")


def _label(row: Row) -> str:
    return _PLAIN if row.method == _PLAIN else f"{row.method}:{row.k}"


def _offset(index: int, n: int) -> float:
    """Points of one method below each other, within half of its line."""
    return 0.0 if n == 1 else 0.5 * (index / (n - 1) - 0.5)


def _points(points: Sequence[Row], places: Sequence[float], name: str, style: draw.SeriesStyle) -> go.Scatter:
    ends = [(each.value or 0.0, each.low, each.high) for each in points]
    return go.Scatter(
        x=[each.value for each in points] or [None],
        y=list(places) or [0],
        mode="markers",
        name=name,
        legendgroup=name,
        marker={"size": 8, "color": style.color, "symbol": style.symbol},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [0.0 if high is None else high - value for value, _, high in ends],
            "arrayminus": [0.0 if low is None else value - low for value, low, _ in ends],
            "thickness": 1.2,
            "width": 3,
            "color": style.color,
        },
        text=[plain(_label(each)) for each in points],
        hovertemplate=f"%{{text}}, {name}<br>%{{x:.4g}}<extra></extra>",
    )


def _axes(figure: go.Figure, shown: _Column, rows: Sequence[Row], row: int, column: int, *, is_last: bool) -> None:
    """The same axis of a measure for all models, and a line where nothing changes."""
    place = {"row": row, "col": column}
    found = [each for each in rows if each.metric == shown.metric]
    values = [end for each in found for end in (each.value, each.low, each.high) if end is not None]
    if shown.metric == "refused":
        figure.update_xaxes(range=[-0.04, 1.04], **place)
    elif shown.is_log:
        logs = [math.log10(max(end, 1e-3)) for end in (*values, 1.0)]
        low, high = min(logs) - 0.1, max(logs) + 0.1
        ticks = [tick for tick in _TICKS if low <= math.log10(tick) <= high]
        ticks = ticks if high - low < 1 else [tick for tick in ticks if tick not in (0.7, 1.5, 3)]
        texts = [f"{tick:g}" for tick in ticks]
        figure.update_xaxes(type="log", range=[low, high], tickvals=ticks, ticktext=texts, **place)
        draw.cut_line(figure, 1.0, **place)
    else:
        low, high = min(0.0, *values), max(0.0, *values)
        figure.update_xaxes(range=[low - 0.06 * (high - low), high + 0.06 * (high - low)], **place)
        draw.cut_line(figure, 0.0, **place)
    if is_last:
        figure.update_xaxes(title=shown.axis, **place)
