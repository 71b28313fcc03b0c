"""How far prompts lie along a direction: projection and cosine of the stream at every layer and position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..interventions import Interventions, as_interventions
from ..model.points import HookedModel
from ..precision import as_double
from ..reading import stream_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Groups, as_groups
from .result import AnalysisResult, call_with_a_run, each_group, prompts_of, provenance_of, template_tokens


@dataclass(frozen=True, eq=False, repr=False)
class ProjectionsResult(AnalysisResult):
    """Projections and cosines of every prompt, on the direction and on a random one, at the last positions.

    Examples:
        >>> found.group_names, len(found.rows("harmful"))
        (('harmful', 'harmless'), 6)
        >>> bool((found.cosines.abs() <= 1).all())
        True
        >>> found.projections.shape == (len(found.prompts), len(found.positions), model.cfg.n_layers + 1)
        True
    """

    kind: ClassVar[str] = "projections"
    units: ClassVar[Mapping[str, str]] = {
        "projections": "residual stream units",
        "cosines": "cosine, -1 to 1",
        "control_projections": "residual stream units, on a random unit vector",
        "control_cosines": "cosine with a random vector, -1 to 1",
        "direction_norm": "residual stream units",
    }

    projections: Float[Tensor, "prompt pos layer"]
    """float64; layers 0..n_layers."""
    cosines: Float[Tensor, "prompt pos layer"]
    control_projections: Float[Tensor, "prompt pos layer"]
    control_cosines: Float[Tensor, "prompt pos layer"]
    groups: tuple[str, ...]
    """The group of every prompt."""
    prompts: tuple[str, ...]
    positions: tuple[int, ...]
    """Counted from the end; the first is the last token of the instruction, the others the template's."""
    position_tokens: tuple[str, ...]
    """Text of the token at each position; that of the instruction differs between prompts."""
    direction_layer: int
    direction_position: int | None
    direction_norm: float

    def __post_init__(self) -> None:
        if not len(self.projections) == len(self.groups) == len(self.prompts):
            raise ValueError(f"{len(self.projections)} rows, {len(self.groups)} groups, {len(self.prompts)} prompts")
        if self.projections.shape != self.cosines.shape or self.projections.shape[1] != len(self.positions):
            raise ValueError(f"{tuple(self.projections.shape)} projections for {len(self.positions)} positions")

    @property
    def group_names(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(dict.fromkeys(self.groups))

    def rows(self, group: str) -> list[int]:
        """The rows of one group."""
        return [row for row, name in enumerate(self.groups) if name == group]


def project_residuals(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    groups: Groups,
    *,
    interventions: Interventions = (),
    seed: int = 0,
    batch_size: int = 32,
) -> ProjectionsResult:
    """⟨x, r̂⟩ and ⟨x, r̂⟩ / ‖x‖ at every layer, the last instruction token and every post-instruction token.

    Arditi et al. (2024, figures 5 and 22). The control is a random direction of equal norm.

    Examples:
        >>> found = project_residuals(model, chat, direction, {"harmful": harmful, "harmless": harmless})
        >>> figure, table = plot_projections(found), found.to_frame()

    Args:
        groups: name -> instructions; "harmful", "harmless", or any other.
        interventions: what is done to the model while it is read.
        seed: of the random direction.

    Raises:
        UserError: there is no group, or an empty one.
    """
    check_in_stream(direction)
    groups, interventions = as_groups(groups), as_interventions(interventions)
    if not groups:
        raise UserError("projections need at least one group of prompts")
    prompts = [text for texts in groups.values() for text in texts]
    n_last = len(chat.positions) + 1
    units = torch.stack([direction.unit, direction.random_like(seed).unit])
    table = torch.empty(2, 2, len(prompts), n_last, model.cfg.n_layers + 1, dtype=torch.float64)
    offset = 0
    for texts in groups.values():
        stream = stream_residuals(model, chat, texts, n_last=n_last, interventions=interventions, batch_size=batch_size)
        for indices, residuals in stream:
            rows = [offset + index for index in indices]
            for layer in range(residuals.shape[2]):
                x = as_double(residuals[:, :, layer])
                along = torch.einsum("bpd,kd->kbp", x, units.to(x.device)).cpu()
                table[0, :, rows, :, layer] = along
                table[1, :, rows, :, layer] = along / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny).cpu()
        offset += len(texts)
    settings = {"seed": seed, "interventions": [repr(item) for item in interventions]}
    return ProjectionsResult(
        table[0, 0],
        table[1, 0],
        table[0, 1],
        table[1, 1],
        each_group(groups),
        tuple(prompts),
        tuple(range(-n_last, 0)),
        ("last instruction token", *template_tokens(chat)),
        direction.layer,
        direction.position,
        direction.norm,
        provenance=provenance_of(model, chat, groups, {**settings, "direction": direction.describe()}),
    )


def from_run(run: RunInputs) -> ProjectionsResult:
    """The held-out prompts of a run on its direction."""
    groups, size = prompts_of(run), run.batch_size
    return project_residuals(run.model, run.chat, run.direction, groups, seed=run.seed, batch_size=size)


Measure = Literal["projections", "cosines"]


def plot_projections(result: ProjectionsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean ± SD of ⟨x, r̂⟩ against layer: last instruction token, the direction's own position, last position.

    Examples:
        >>> plot_projections(found).layout.title.text
        'Projection on the direction'
    """
    return _lines(result, "projections", "⟨x, r̂⟩ (residual stream units)", "Projection on the direction", look)


def plot_cosines(result: ProjectionsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """The same for the cosine, which does not grow with the stream.

    Examples:
        >>> plot_cosines(found, title="My model").layout.title.text
        'My model'
    """
    return _lines(result, "cosines", "cos(x, r̂)", "Cosine with the direction", look)


def plot_projection_map(result: ProjectionsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Difference of the first two groups' mean cosines at every position and layer; beside it a random direction.

    Examples:
        >>> plot_projection_map(found).layout.xaxis.title.text
        'layer (stream entering the block)'
    """
    first, second = (result.group_names * 2)[:2]
    layers = [str(layer) for layer in range(result.cosines.shape[2])]
    labels = _labels(result)
    tables = [
        values[result.rows(first)].mean(0) - values[result.rows(second)].mean(0)
        for values in (result.cosines, result.control_cosines)
    ]
    figure, limits = draw.panels(["the direction", "a random direction"], gap=0.03), draw.symmetric(tables[0])
    for column, table in enumerate(tables, start=1):
        hover = "position %{y}<br>layer %{x}<br>difference %{z:.4f}"
        trace = draw.heatmap(table, layers, labels, "difference of cosines", hover=hover, limits=limits)
        trace.showscale = column == 2
        figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title="layer (stream entering the block)")
    figure.update_yaxes(title="position", col=1, automargin=True)
    draw.categories(figure)
    about = draw.subtitle(result.model_name, _counts(result), f"mean cosine, {first} − {second}")
    height = max(220, 34 * len(labels))
    title = "Where the groups differ along the direction"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def _lines(result: ProjectionsResult, measure: Measure, unit: str, title: str, look: draw.Look) -> go.Figure:
    values, control = getattr(result, measure), getattr(result, f"control_{measure}")
    wanted = sorted({result.positions[0], result.direction_position or -1, -1})
    labels = dict(zip(result.positions, _labels(result), strict=True))
    figure = draw.panels([f"position {labels[position]}" for position in wanted], gap=0.03)
    layers = range(values.shape[2])
    for column, position in enumerate(wanted, start=1):
        place, slot = {"row": 1, "col": column}, result.positions.index(position)
        for group, style in zip(result.group_names, draw.group_styles(result.group_names), strict=True):
            rows = result.rows(group)
            name = f"{draw.plain(group)} (n = {len(rows)})"
            hover = f"<b>{draw.plain(group)}</b>, layer %{{x}}<br>%{{y:.4f}} ± %{{customdata:.4f}}"
            draw.add_spread(figure, values[rows, slot], name, style, hover, **place)
        mean, hover = control[:, slot].mean(0).tolist(), "random direction, layer %{x}<br>%{y:.4f}"
        draw.add_line(figure, layers, mean, "random direction, all prompts", draw.CONTROL, hover, None, **place)
        draw.zero_line(figure, **place)
        if position == result.direction_position:
            draw.cut_line(figure, result.direction_layer, **place)
    draw.layer_axis(figure, "layer")
    figure.update_yaxes(title=unit, col=1)
    where = f"{draw.read_at(result.direction_position, result.direction_layer)} (dotted line)"
    about = draw.subtitle(result.model_name, where, "bands: ± 1 SD over prompts")
    return draw.finish(figure, title=title, about=about, height=360, look=look)


def _labels(result: ProjectionsResult) -> list[str]:
    pairs = list(zip(result.positions, result.position_tokens, strict=True))
    first = f"{draw.signed(pairs[0][0])} (last of instruction)"
    return [first, *(draw.position_label(position, token) for position, token in pairs[1:])]


def _counts(result: ProjectionsResult) -> str:
    return draw.counted({group: len(result.rows(group)) for group in result.group_names})


FIGURES = {
    "projections": plot_projections,
    "projections_cosines": plot_cosines,
    "projections_map": plot_projection_map,
}

call_with_a_run(__name__)
