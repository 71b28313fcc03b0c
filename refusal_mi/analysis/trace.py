"""A direction through an answer: the projection at every generated token, with and without interventions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import circuitsvis
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..figures.views import SIGNS, Page, View, page, shown_tokens
from ..generation import generate
from ..interventions import Ablate, Add, Interventions, as_interventions
from ..model.points import HookedModel, resid_hook
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Groups, as_groups
from .result import AnalysisResult, call_with_a_run, each_group, prompts_of, provenance_of

N_PROMPTS, RUN_TOKENS = 24, 40


@dataclass(frozen=True, eq=False, repr=False)
class TraceResult(AnalysisResult):
    """Projection of the stream on a unit direction at every token of answers, under several conditions.

    The stream is the one that enters `layer`, after the interventions of the condition have acted on it: an ablation of
    all writes leaves 0 there, and an addition at this layer is in it.

    Examples:
        >>> found.conditions, sorted(set(found.groups))
        (('plain', 'ablated', 'added'), ['harmful', 'harmless'])
        >>> found.values.shape[:2] == (len(found.conditions), len(found.prompts))
        True
    """

    kind: ClassVar[str] = "trace"
    units: ClassVar[Mapping[str, str]] = {"values": "residual stream units along the unit direction"}

    conditions: tuple[str, ...]
    groups: tuple[str, ...]
    """The group of every prompt."""
    prompts: tuple[str, ...]
    n_template: int
    """How many tokens before the answer come first: the post-instruction tokens."""
    tokens: tuple[tuple[tuple[str, ...], ...], ...]
    """`[condition][prompt]`: the template tokens, then the answer's."""
    values: Float[Tensor, "condition prompt token"]
    """float64; NaN after the end of an answer."""
    layer: int
    controls: tuple[str, ...] = ()
    """The conditions that are controls."""

    def __post_init__(self) -> None:
        lengths = [[len(row) for row in rows] for rows in self.tokens]
        if self.values.shape[:2] != (len(self.conditions), len(self.prompts)):
            raise ValueError(f"traces have shape {tuple(self.values.shape)}")
        if (~self.values.isnan()).sum(-1).tolist() != lengths:
            raise ValueError("every token needs one value")

    def means(self, condition: str, group: str) -> Float[Tensor, "stat token"]:
        """Mean, SD and count of the traces of a group at every token, over the answers that are that long."""
        rows = torch.tensor([name == group for name in self.groups])
        values = self.values[self.conditions.index(condition)][rows]
        count = (~values.isnan()).sum(0)
        mean = values.nanmean(0)
        spread = ((values - mean).square().nansum(0) / (count - 1).clamp(min=1)).sqrt()
        return torch.stack([mean, spread, count.double()])


def trace_generation(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    groups: Groups,
    *,
    conditions: Mapping[str, Interventions] | None = None,
    layer: int | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 8,
    seed: int = 0,
) -> TraceResult:
    """⟨x, r̂⟩ where each token of a greedy answer is read, after the interventions of each condition.

    Each condition generates its own answer and reads it under its own interventions.

    Examples:
        >>> found = trace_generation(model, chat, direction, {"harmful": harmful}, max_new_tokens=2)
        >>> figure = plot_trace(found)

    Args:
        groups: name -> instructions.
        conditions: name -> interventions; by default plain, the direction ablated, the direction added, and as
            controls a random direction of the same norm ablated and added.
        layer: the stream that is projected; the direction's own by default.
        seed: of the random direction.

    Raises:
        UserError: a group has no prompts, or there is no such layer.
    """
    check_in_stream(direction)
    groups = as_groups(groups)
    if not groups or not all(groups.values()):
        raise UserError("trace_generation needs at least one prompt in every group")
    controls: dict[str, Interventions] = {}
    if conditions is None:
        random = direction.random_like(seed)
        conditions = {"plain": (), "ablated": (Ablate(direction),), "added": (Add(direction),)}
        controls = {"random ablated": (Ablate(random),), "random added": (Add(random),)}
    layer = direction.layer if layer is None else layer
    hook_name = resid_hook(layer, model.cfg.n_layers)
    prompts = [text for texts in groups.values() for text in texts]
    traces = {}
    for name, change in {**conditions, **controls}.items():
        interventions = as_interventions(change)
        answers = generate(
            model,
            chat,
            prompts,
            interventions=interventions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=f"generating, {name}",
        )
        rows = [[*row, *answer.token_ids] for row, answer in zip(chat.encode_all(prompts), answers, strict=True)]
        kept = [len(chat.positions) + len(answer.token_ids) for answer in answers]
        traces[name] = _read(model, chat, direction, rows, kept, interventions, hook_name, batch_size)
    tokens = tuple(tuple(labels for labels, _ in trace) for trace in traces.values())
    width = max(len(labels) for rows in tokens for labels in rows)
    values = torch.full((len(traces), len(prompts), width), float("nan"), dtype=torch.float64)
    for index, trace in enumerate(traces.values()):
        for prompt, (_, projections) in enumerate(trace):
            values[index, prompt, : len(projections)] = projections
    return TraceResult(
        tuple(traces),
        each_group(groups),
        tuple(prompts),
        len(chat.positions),
        tokens,
        values,
        layer,
        tuple(controls),
        provenance=provenance_of(
            model, chat, groups, {"direction": direction.describe(), "hook_name": hook_name, "seed": seed}
        ),
    )


def from_run(run: RunInputs) -> TraceResult:
    """Held-out prompts of each side: plain, with the chosen direction ablated and added, and with a random one."""
    groups = prompts_of(run, n=N_PROMPTS)
    return trace_generation(
        run.model,
        run.chat,
        run.direction,
        groups,
        max_new_tokens=RUN_TOKENS,
        batch_size=run.batch_size,
        seed=run.seed,
    )


def _read(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    rows: Sequence[Sequence[int]],
    kept: Sequence[int],
    interventions: Interventions,
    hook_name: str,
    batch_size: int,
) -> list[tuple[tuple[str, ...], Tensor]]:
    """Text and projection of the last `kept` tokens of each row, read with the whole text in one pass."""
    traces: list[tuple[tuple[str, ...], Tensor]] = [((), torch.empty(0))] * len(rows)
    for indices, batch in batches(model, rows, chat.pad_id, batch_size, description="reading answers", is_shown=False):
        prompt_widths = torch.tensor(
            [batch.tokens.shape[1] - kept[index] + len(chat.positions) for index in indices], device=batch.tokens.device
        )
        reader = {hook_name: as_double}
        streams = captured(model, batch, reader, interventions=interventions, prompt_width=prompt_widths)
        projections = streams[hook_name].cpu() @ direction.unit
        for index, values in zip(indices, projections, strict=True):
            labels = chat.tokenizer.convert_ids_to_tokens(list(rows[index][-kept[index] :]))
            traces[index] = (tuple(labels), values[-kept[index] :])
    return traces


_UNIT = "⟨x, r̂⟩ (residual stream units)"
_TOKEN = "token of the answer (template tokens up to 0)"
_MAX_VIEWS = 12


def plot_trace(result: TraceResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean ± SD of the projection at every token, over how many answers are that long, one panel a group.

    The template's tokens come first; controls have no band.

    Examples:
        >>> plot_trace(found, width=600).layout.width
        600
    """
    groups = list(dict.fromkeys(result.groups))
    titles = [f"<b>{draw.plain(group)} prompts</b> (n = {result.groups.count(group)})" for group in groups]
    figure = make_subplots(
        2,
        len(groups),
        subplot_titles=[*titles, *[""] * len(groups)],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.05,
        row_heights=[0.75, 0.25],
    )
    x = [index - result.n_template + 1 for index in range(result.values.shape[-1])]
    for column, group in enumerate(groups, start=1):
        place = {"row": 1, "col": column}
        for condition, style in _styles(result).items():
            name = draw.plain(condition)
            mean, sd, count = result.means(condition, group)
            shown = int((count > 0).sum())
            means, counts = mean[:shown].tolist(), count[:shown].tolist()
            if condition not in result.controls:
                low, high = (mean - sd)[:shown].tolist(), (mean + sd)[:shown].tolist()
                figure.add_trace(draw.band(x[:shown], low, high, name, style), **place)
            hover = f"<b>{name}</b>, token %{{x}}<br>%{{y:.3f}}, %{{customdata:.0f}} answers<extra></extra>"
            trace = draw.line(x[:shown], means, name, style, customdata=counts, hovertemplate=hover)
            trace.marker.size = 5
            figure.add_trace(trace, **place)
            hover = f"<b>{name}</b>, token %{{x}}<br>%{{y:.0f}} answers are that long<extra></extra>"
            trace = draw.line(x, count.tolist(), name, style, mode="lines", showlegend=False, hovertemplate=hover)
            figure.add_trace(trace, row=2, col=column)
        _mark_start(figure, **place)
        draw.cut_line(figure, 0.5, row=2, col=column)
        figure.update_xaxes(title=None, tick0=None, dtick=None, row=1, col=column)
        figure.update_xaxes(title=_TOKEN, tick0=0, dtick=1, row=2, col=column)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(title=_UNIT, row=1, col=1)
    figure.update_yaxes(title="answers", rangemode="tozero", row=2, col=1)
    about = draw.subtitle(
        result.model_name,
        f"stream entering layer {result.layer}, after the intervention",
        "bands: ± 1 SD over the answers that long",
        "random: of the same norm" if result.controls else "",
    )
    title = "The direction through the answer"
    return draw.finish(figure, title=title, about=about, height=460, look=look)


def _styles(result: TraceResult) -> dict[str, draw.SeriesStyle]:
    """The look of every condition."""
    own = [name for name in result.conditions if name not in result.controls]
    styles = {name: draw.other_style(index) for index, name in enumerate(own)}
    return styles | {name: draw.control_style(index) for index, name in enumerate(result.controls)}


def trace_page(result: TraceResult) -> Page:
    """Answers as colored tokens, every prompt under every condition, all on one scale.

    Examples:
        >>> trace_page(found).startswith("<!doctype html>")
        True
    """
    finite = result.values[~result.values.isnan()]
    largest = max(float(finite.abs().max()), 1e-12)
    per_prompt = len(result.conditions)
    views = []
    for prompt in range(min(len(result.prompts), max(1, _MAX_VIEWS // per_prompt))):
        for index, condition in enumerate(result.conditions):
            tokens = result.tokens[index][prompt]
            values = result.values[index, prompt, : len(tokens)]
            view = circuitsvis.tokens.colored_tokens(
                shown_tokens(tokens), values, min_value=-largest, max_value=largest
            )
            views.append(View(f"{result.groups[prompt]} prompt {prompt + 1}, {condition}", view))
    about = f"{result.model_name} · {_UNIT} at layer {result.layer} · {SIGNS}, up to ±{largest:.3g}"
    return page("The direction through the answer", about, views)


def plot_trace_single(result: TraceResult, **look: Unpack[draw.Look]) -> go.Figure:
    """The projection at every token of the first prompt's answers, with the tokens on hover.

    Examples:
        >>> plot_trace_single(found).layout.title.text
        'The direction through one answer'
    """
    figure = go.Figure()
    styles = _styles(result)
    for index, condition in enumerate(result.conditions):
        tokens = result.tokens[index][0]
        x = [place - result.n_template + 1 for place in range(len(tokens))]
        y = result.values[index, 0, : len(tokens)].tolist()
        labels = [draw.shortened(draw.token_text(token)) for token in tokens]
        name = draw.plain(condition)
        hover = f"<b>{name}</b>, token %{{x}} '%{{customdata}}'<br>%{{y:.3f}}"
        draw.add_line(figure, x, y, name, styles[condition], hover, labels)
    _mark_start(figure)
    figure.update_yaxes(title=_UNIT)
    about = (
        draw.subtitle(result.model_name, f"stream entering layer {result.layer}", f"prompt 1 of {len(result.prompts)}")
        + f": “{draw.shortened(result.prompts[0])}” ({draw.plain(result.groups[0])})"
    )
    title = "The direction through one answer"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _mark_start(figure: go.Figure, **place: int) -> None:
    """Zero, and where the answer begins."""
    draw.zero_line(figure, **place)
    draw.cut_line(figure, 0.5, **place)
    figure.update_xaxes(title=_TOKEN, tick0=0, dtick=1, **place)


FIGURES = {"trace": plot_trace, "trace_single": plot_trace_single, "trace_tokens": trace_page}

call_with_a_run(__name__)
