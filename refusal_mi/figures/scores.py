"""Per-layer refusal scores: every candidate by source layer, one line per post-instruction position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import UserError
from ..search.grid import ScoreGrid
from ..search.thresholds import NO_THRESHOLDS, CandidateScore, Thresholds
from ..stats import mean_interval
from ..values import check_named
from .style import (
    CHOSEN,
    INK,
    MUTED,
    SHADE,
    Look,
    SeriesStyle,
    finish,
    interval_bars,
    line,
    other_style,
    plain,
    position_label,
    series_styles,
    signed,
)

Measure = Literal["bypass", "induce", "kl"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
_KL_FLOOR = 1e-4
_NARROW = 360
"""What a single column of panels is laid out for (px)."""
_THIN = 1.6
"""Width of lines that stand close together (px)."""
_FAINT = 0.4
"""Opacity of what is known of candidates that a staged search left out."""


@dataclass(frozen=True)
class _Axis:
    title: str
    short: str
    label: str
    side: str


_AXES: dict[Measure, _Axis] = {
    "bypass": _Axis(
        "Refusal score on harmful prompts, candidate ablated",
        "harmful prompts, candidate ablated",
        "mean refusal score, log-odds (nats)",
        "harmful",
    ),
    "induce": _Axis(
        "Refusal score on harmless prompts, candidate added",
        "harmless prompts, candidate added",
        "mean refusal score, log-odds (nats)",
        "harmless",
    ),
    "kl": _Axis(
        "KL(plain ‖ ablated) on harmless prompts",
        "harmless prompts, candidate ablated",
        "next-token KL (nats, log scale)",
        "harmless",
    ),
}


def plot_scores(
    scores: ScoreGrid,
    *,
    measure: Measure = "bypass",
    chosen: CandidateScore | None = None,
    thresholds: Thresholds | None = None,
    tokens: Sequence[str] | None = None,
    model: str = "",
    **look: Unpack[Look],
) -> go.Figure:
    """One score of every candidate against its source layer; a candidate without a score is a gap.

    Candidates that a search left out are faint: the mean over the prompts that they were screened on, with its 95%
    interval; a faint line joins all candidates of a position that were measured.
    Filled markers satisfy every threshold, open ones do not; layers that the thresholds leave out are shaded.
    Candidates carry the 95% interval of their mean over prompts (Student's t) where the grid has the scores of every
    prompt. KL is on a log scale from 1e-4 nats, so candidates that change nothing fall off its bottom.

    Examples:
        >>> plot_scores(scores, measure="bypass", width=350).layout.width
        350

    Args:
        chosen: ringed.
        tokens: text of the post-instruction tokens, the last one at position −1.
        model: named under the title.
    """
    check_named("measure", measure, get_args(Measure))
    figure = go.Figure()
    names = _draw(figure, scores, measure, chosen, thresholds, tokens, place={}, is_first=True)
    _label_axes(figure, scores, measure, thresholds, {})
    about = _about(scores, [measure], model) + _marker_note(thresholds)
    return finish(figure, title=_AXES[measure].title, about=about, height=400, legend_names=names, look=look)


def plot_score_panels(
    scores: ScoreGrid,
    *,
    chosen: CandidateScore | None = None,
    thresholds: Thresholds | None = None,
    tokens: Sequence[str] | None = None,
    model: str = "",
    columns: Literal[1, 3] = 3,
    **look: Unpack[Look],
) -> go.Figure:
    """`plot_scores` for the three measures, side by side or, where there is no room, below each other; one legend.

    Examples:
        >>> plot_score_panels(scores, title="My model").layout.title.text
        'My model'

    Args:
        columns: 1 is for a narrow page, as a width of 360 is.
    """
    if columns == 1:
        look = {"width": _NARROW, **look}
    titles = [f"<b>{name}</b><br>{_AXES[measure].short}" for name, measure in _PANELS]
    figure = make_subplots(1, 3, subplot_titles=titles)
    figure.update_annotations(font_size=13)
    names: list[str] = []
    for index, (_, measure) in enumerate(_PANELS):
        place = {"row": 1, "col": index + 1}
        drawn = _draw(figure, scores, measure, chosen, thresholds, tokens, place=place, is_first=index == 0)
        names.extend(name for name in drawn if name not in names)
        _label_axes(figure, scores, measure, thresholds, place)
    about = _about(scores, list(MEASURES), model) + _marker_note(thresholds)
    title = "Refusal scores by source layer and position"
    return finish(figure, title=title, about=about, height=330, legend_names=names, look=look)


def plot_score_lines(
    grids: Mapping[str, ScoreGrid],
    *,
    measure: Measure = "bypass",
    position: int | None = None,
    model: str = "",
    **look: Unpack[Look],
) -> go.Figure:
    """One score of several models, runs or sets of refusal tokens against the source layer, one line each.

    At each layer stands the candidate of `position`, or else the one that bypasses best, with its 95% interval over
    prompts where the grid has them. Models of unequal depth share an axis from 0 to 1. The plain models' scores are
    dotted.

    Examples:
        >>> figure = plot_score_lines({"one model": scores, "another": scores})

    Args:
        grids: name -> scores of every candidate.
        position: the same for all; None takes the best of each layer.
        model: named under the title.

    Raises:
        UserError: there is no grid, or none has the position.
    """
    check_named("measure", measure, get_args(Measure))
    if not grids:
        raise UserError("give at least one score grid: {'name': sweep(...)}")
    depths = {grid.n_layers for grid in grids.values()}
    figure = go.Figure()
    for index, (name, grid) in enumerate(grids.items()):
        rows = _of_layers(grid, position)
        if not rows:
            raise UserError(f"{name} has no scores at position {position}: its positions are {list(grid.positions)}")
        style, label = other_style(index), plain(name)
        x = [row.layer / grid.n_layers if len(depths) > 1 else row.layer for row in rows]
        custom = [[row.position, row.layer] for row in rows]
        hover = (
            f"<b>{label}</b>, position %{{customdata[0]}}, layer %{{customdata[1]}}<br>%{{y:.4g}} nats<extra></extra>"
        )
        trace = line(x, [_value(row, measure) for row in rows], label, style, customdata=custom, hovertemplate=hover)
        figure.add_trace(_with_intervals(trace, [_interval(grid, row, measure) for row in rows], style, measure))
        base = {"bypass": grid.baseline_harmful, "induce": grid.baseline_harmless, "kl": None}[measure]
        if base is not None:
            mark = {"color": style.color, "dash": "2px,2px", "width": 1.2}
            figure.add_trace(
                go.Scatter(
                    x=[x[0], x[-1]],
                    y=[base, base],
                    mode="lines",
                    line=mark,
                    name=f"{label}, plain",
                    legendgroup=label,
                    showlegend=False,
                    hovertemplate=f"{label}, plain model %{{y:.4g}} nats<extra></extra>",
                )
            )
    at = "the best position of each layer" if position is None else f"position {signed(position)}"
    is_shared = len(depths) == 1
    figure.update_xaxes(title="source layer" if is_shared else "source layer / number of layers")
    if is_shared:
        figure.update_xaxes(range=[-0.5, max(depths) - 0.5], tick0=0, dtick=1)
    figure.update_yaxes(title=_AXES[measure].label)
    if measure == "kl":
        figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    parts = (plain(model), at, "95% intervals", "" if measure == "kl" else "dotted: plain model")
    about = " · ".join(part for part in parts if part)
    return finish(figure, title=_AXES[measure].title, about=about, height=400, look=look)


def _of_layers(grid: ScoreGrid, position: int | None) -> list[CandidateScore]:
    """One measured candidate for each layer, in order."""
    best: dict[int, CandidateScore] = {}
    for row in grid.rows:
        if not row.is_finite or row.bypass is None or position not in (None, row.position):
            continue
        known = best.get(row.layer)
        if known is None or known.bypass is None or row.bypass < known.bypass:
            best[row.layer] = row
    return [best[layer] for layer in sorted(best)]


_PANELS: tuple[tuple[str, Measure], ...] = (("Bypass", "bypass"), ("Induce", "induce"), ("KL", "kl"))


def plot_norms(
    norms: Sequence[Sequence[float]],
    positions: Sequence[int],
    *,
    tokens: Sequence[str] | None = None,
    model: str = "",
    n_prompts: int | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Length of the candidate directions against layer, one line per position.

    Examples:
        >>> figure = plot_norms(grid.vectors.norm(dim=-1).tolist(), grid.positions)
        >>> len(figure.data) == len(grid.positions), figure.layout.yaxis.title.text
        (True, '‖candidate direction‖ (residual stream units)')

    Args:
        norms: `[position][layer]`.
    """
    figure = go.Figure()
    names = _position_names(positions, tokens)
    for name, row, style in zip(names, norms, series_styles(len(positions)), strict=True):
        hover = f"position {name}<br>layer %{{x}}<br>norm %{{y:.3g}}<extra></extra>"
        figure.add_trace(line(range(len(row)), row, name, style, hovertemplate=hover).update(line_width=_THIN))
    figure.update_xaxes(title="layer (stream entering the block)", tick0=0, dtick=1)
    figure.update_yaxes(title="‖candidate direction‖ (residual stream units)", rangemode="tozero")
    about = " · ".join(part for part in (plain(model), f"n = {n_prompts} prompts" if n_prompts else "") if part)
    title = "Length of the candidate directions"
    return finish(figure, title=title, about=about, height=420, legend_names=names, look=look)


def _draw(
    figure: go.Figure,
    scores: ScoreGrid,
    measure: Measure,
    chosen: CandidateScore | None,
    thresholds: Thresholds | None,
    tokens: Sequence[str] | None,
    *,
    place: dict[str, int],
    is_first: bool,
) -> list[str]:
    """Add one panel's traces and return the names that it has in the legend."""
    styles = list(zip(scores.positions, series_styles(len(scores.positions)), strict=True))
    suffix = "" if thresholds is None else "-open"
    faint = [each for at, style in styles for each in _faint_lines(scores, at, measure, style, suffix, tokens)]
    for trace in faint:
        figure.add_trace(trace, **place)
    shown = {trace.name for trace in figure.data if trace.showlegend is not False}
    traces = [_position_line(scores, position, measure, style, thresholds, tokens) for position, style in styles]
    if faint:
        traces.append(_faint_key(scores))
    traces.extend(_references(scores, measure, thresholds))
    if chosen is not None and _value(chosen, measure) is not None:
        traces.append(_star(scores, chosen, measure))
    for trace in traces:
        trace.showlegend, trace.legendgroup = trace.name not in shown, trace.name
        figure.add_trace(trace, **place)
    _shade_pruned(
        figure, scores, thresholds, "bottom" if measure == "bypass" else "top", place
    )  # after the traces: plotly shades no empty panel
    return [trace.name for trace in traces]


def _position_line(
    scores: ScoreGrid,
    position: int,
    measure: Measure,
    style: SeriesStyle,
    thresholds: Thresholds | None,
    tokens: Sequence[str] | None,
) -> go.Scatter:
    rows = sorted((row for row in scores.rows if row.position == position), key=lambda row: row.layer)
    broken = [
        thresholds.reasons(row, scores.n_layers, scores.zero_point) if thresholds is not None else () for row in rows
    ]
    values = [_value(row, measure) for row in rows]
    if measure == "kl":  # a log axis has no place for zero, nor for the -1e-7 that the epsilon in KL leaves
        values = [value if value is not None and value > 0 else None for value in values]
    (name,) = _position_names([position], tokens)
    verdicts = [
        "" if thresholds is None else f"fails: {', '.join(reasons)}" if reasons else "survives" for reasons in broken
    ]
    numbers = [[_number(_value(row, each)) for each in MEASURES] for row in rows]
    hover = (
        f"<b>position {name}, layer %{{x}}</b><br>bypass %{{customdata[0]}} nats<br>induce %{{customdata[1]}} nats"
        "<br>KL %{customdata[2]} nats<br>%{customdata[3]}<extra></extra>"
    )
    custom = [[*row, verdict] for row, verdict in zip(numbers, verdicts, strict=True)]
    trace = line([row.layer for row in rows], values, name, style, customdata=custom, hovertemplate=hover)
    trace.line.width = _THIN
    trace.marker.symbol = [style.symbol + ("-open" if reasons else "") for reasons in broken]
    return _with_intervals(trace, [_interval(scores, row, measure) for row in rows], style, measure)


def _interval(scores: ScoreGrid, row: CandidateScore, measure: Measure) -> tuple[float, float, float] | None:
    """Mean and 95% interval over prompts, of a candidate with the scores of every prompt."""
    values = _of_each_prompt(scores, row, measure) if _value(row, measure) is not None else []
    return mean_interval(values) if len(values) > 1 else None


def _with_intervals(
    trace: go.Scatter, found: Sequence[tuple[float, float, float] | None], style: SeriesStyle, measure: Measure
) -> go.Scatter:
    """Thin intervals on a line; on a log axis they end above zero."""
    if not any(found):
        return trace
    least = _KL_FLOOR / 100 if measure == "kl" else -math.inf
    known = [
        (0.0, 0.0, 0.0) if each is None else (each[0], max(each[1], min(each[0], least)), each[2]) for each in found
    ]
    return trace.update(error_y={**interval_bars(known, 2), "color": style.color, "thickness": 1})


def _screened(scores: ScoreGrid, measure: Measure) -> dict[tuple[int, int], tuple[float, float, float, int]]:
    """(position, layer) -> mean, its 95% interval and n, of the candidates that were left out after some prompts."""
    left_out = [row for row in scores.rows if row.skipped is not None]
    known = {(row.position, row.layer): _of_each_prompt(scores, row, measure) for row in left_out}
    found = {place: (*mean_interval(values), len(values)) for place, values in known.items() if values}
    return {place: each for place, each in found.items() if math.isfinite(each[0])}


def _faint_lines(
    scores: ScoreGrid,
    position: int,
    measure: Measure,
    style: SeriesStyle,
    suffix: str,
    tokens: Sequence[str] | None,
) -> list[go.Scatter]:
    """What is known of a position's candidates that the search left out, and a line through all that were measured."""
    screened = {layer: found for (at, layer), found in _screened(scores, measure).items() if at == position}
    exact = {row.layer: _value(row, measure) for row in scores.rows if row.position == position}
    means = {**exact, **{layer: mean for layer, (mean, *_) in screened.items()}}
    low = 0.0 if measure == "kl" else -math.inf  # a log axis has no place for zero
    points = {layer: mean for layer, mean in sorted(means.items()) if mean is not None and mean > low}
    shown = {layer: screened[layer] for layer in points if layer in screened}
    if not shown:
        return []
    (name,) = _position_names([position], tokens)
    hover = (
        f"<b>position {name}, layer %{{x}}</b><br>screened: %{{y:.4g}} nats<br>95% interval %{{customdata[0]:.3g}} to "
        "%{customdata[1]:.3g} (Student's t, n = %{customdata[2]})<extra></extra>"
    )
    through = line(list(points), list(points.values()), name, style, mode="lines", hoverinfo="skip")
    through.line.width = _THIN
    bars = interval_bars([found[:3] for found in shown.values()], 0) | {"color": style.color, "thickness": 1}
    means_of = [found[0] for found in shown.values()]
    marked = line(list(shown), means_of, name, style, mode="markers", hovertemplate=hover, error_y=bars)
    marked.update(customdata=[found[1:] for found in shown.values()], marker_symbol=style.symbol + suffix)
    return [trace.update(opacity=_FAINT, showlegend=False) for trace in (through, marked)]


def _faint_key(scores: ScoreGrid) -> go.Scatter:
    """What faint means, for the legend; the same in every panel."""
    sizes = sorted(n for measure in MEASURES for *_, n in _screened(scores, measure).values())
    name = f"screened, n = {sizes[0]}" + (f"–{sizes[-1]}" if sizes[-1] > sizes[0] else "")
    return line([None], [None], name, SeriesStyle(MUTED, "solid", "circle-open")).update(opacity=_FAINT)


def _references(scores: ScoreGrid, measure: Measure, thresholds: Thresholds | None) -> list[go.Scatter]:
    """The plain model's score (dashed), a survivor's limit, and a calibrated zero point (dotted)."""
    plain_score = {"bypass": scores.baseline_harmful, "induce": scores.baseline_harmless, "kl": None}[measure]
    limit, is_calibrated = None, scores.zero_point is not None
    if thresholds is not None:
        floor = None if thresholds.induce_min is None else thresholds.induce_floor(scores.zero_point)
        limit = {"bypass": None, "induce": None if is_calibrated else floor, "kl": thresholds.kl_max}[measure]
    edges = [-0.5, scores.n_layers - 0.5]
    zero_point = None if measure == "kl" else scores.zero_point
    levels = (
        ("plain model", plain_score, INK, "6px,2px", _THIN),
        ("threshold", limit, INK, "2px,2px", 1.8),
        ("counts as refused above", zero_point, MUTED, "2px,2px", 1.8),
    )
    return [
        go.Scatter(
            x=edges,
            y=[value] * 2,
            mode="lines",
            line={"color": color, "dash": dash, "width": width},
            name=name,
            hovertemplate=f"{name} {_number(value)} nats<extra></extra>",
        )
        for name, value, color, dash, width in levels
        if value is not None
    ]


def _shade_pruned(
    figure: go.Figure, scores: ScoreGrid, thresholds: Thresholds | None, edge: str, place: dict[str, int]
) -> None:
    if thresholds is None or thresholds.prune_layers is None:
        return
    cut = int(scores.n_layers * (1.0 - thresholds.prune_layers))
    if cut < scores.n_layers:
        figure.add_vrect(
            cut - 0.5,
            scores.n_layers - 0.5,
            fillcolor=SHADE,
            line_width=0,
            layer="below",
            annotation={"text": "left out", "font": {"size": 11, "color": MUTED}},
            annotation_position=edge,
            **place,
        )


def _star(scores: ScoreGrid, chosen: CandidateScore, measure: Measure) -> go.Scatter:
    value = _value(chosen, measure)
    values = _of_each_prompt(scores, chosen, measure)
    text, error = f"{_number(value)} nats", None
    if values:
        mean, low, high = mean_interval(values)
        text += f"<br>95% interval {low:.3g} to {high:.3g} (Student's t, n = {len(values)})"
        error = {"type": "data", "array": [high - mean], "arrayminus": [mean - low], "color": INK, "thickness": 1.8}
    return go.Scatter(
        x=[chosen.layer],
        y=[value],
        error_y=error,
        mode="markers",
        marker={"symbol": "circle-open", "size": 19, "color": CHOSEN, "line": {"width": 3.5}},
        name="chosen" + (", 95% interval" if values else ""),
        hovertemplate=f"<b>chosen: position {chosen.position}, layer {chosen.layer}</b><br>{text}<extra></extra>",
    )


def _label_axes(
    figure: go.Figure, scores: ScoreGrid, measure: Measure, thresholds: Thresholds | None, place: dict[str, int]
) -> None:
    edges = [-0.5, scores.n_layers - 0.5]
    figure.update_xaxes(title="source layer", range=edges, tick0=0, dtick=1, **place)
    figure.update_yaxes(title=_AXES[measure].label, **place)
    if measure == "kl":
        limit = 0.0 if thresholds is None else thresholds.kl_max or 0.0
        screened = [high for _, _, high, _ in _screened(scores, "kl").values()]
        largest = max([limit, 10 * _KL_FLOOR, *(row.kl_nats or 0.0 for row in scores.rows), *screened])
        top = math.log10(largest) + 0.25
        figure.update_yaxes(type="log", range=[math.log10(_KL_FLOOR), top], tickformat="~g", dtick=1, **place)


def _value(row: CandidateScore, measure: Measure) -> float | None:
    return {"bypass": row.bypass, "induce": row.induce, "kl": row.kl_nats}[measure]


def _of_each_prompt(scores: ScoreGrid, row: CandidateScore, measure: Measure) -> list[float]:
    if scores.per_prompt is None or row not in scores.rows:
        return []
    values = scores.per_prompt[scores.rows.index(row), MEASURES.index(measure)].tolist()
    return [value for value in values if not math.isnan(value)]


def _number(value: int | float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _position_names(positions: Sequence[int], tokens: Sequence[str] | None) -> list[str]:
    known = {position: tokens[position] for position in positions if tokens and len(tokens) >= -position}
    return [position_label(position, known.get(position, "")) for position in positions]


def _marker_note(thresholds: Thresholds | None) -> str:
    return "" if thresholds in (None, NO_THRESHOLDS) else " · filled markers pass every threshold"


def _about(scores: ScoreGrid, measures: Sequence[Measure], model: str) -> str:
    """Model and numbers of prompts, as far as they are known."""
    counts: dict[str, int] = {}
    scored = next((row for row in scores.rows if row.is_finite), None)
    for measure in measures:
        n = len(_of_each_prompt(scores, scored, measure)) if scored is not None else 0
        if n:
            counts[_AXES[measure].side] = n
    prompts = "n = " + ", ".join(f"{n} {side}" for side, n in counts.items()) + " prompts" if counts else ""
    return " · ".join(part for part in (plain(model), prompts) if part)
