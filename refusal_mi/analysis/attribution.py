"""Direct feature attribution: which heads, MLPs, embeddings and biases write along a direction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..model.points import EMBEDDING, BlockPoint, HookedModel, block_hook, mlp_output_hook, resid_hook
from ..model.readers import ModelWeights
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..run.folder import RunInputs
from ..stats import mean_interval
from ..text.batches import TokenBatch
from ..text.chat import ChatFormat
from ..text.given import Groups, Prompts, as_groups
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of

MAX_MISFIT = 0.05
"""Largest relative distance between a write and gain × scale × output before the block is called nonlinear here."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionResult(AnalysisResult):
    """Projection of every write into the stream on a unit direction, at one position, per group of prompts.

    heads + attn_biases + mlps + mlp_biases + embeddings = projections, for every prompt.

    Examples:
        >>> found.sums("harmful").allclose(found.projections["harmful"], atol=1e-4), found.largest_error() < 1e-4
        (True, True)
        >>> len(found.top_heads(3, "harmful", against="harmless"))
        3
    """

    kind: ClassVar[str] = "attribution"
    units: ClassVar[Mapping[str, str]] = {
        name: "residual stream units along the unit direction"
        for name in ("heads", "attn_biases", "mlps", "mlp_biases", "embeddings", "projections")
    }

    layer: int
    """The stream that is explained: what enters this block; n_layers is the stream after the last."""
    position: int
    """The prompt position, counted from the end."""
    groups: tuple[str, ...]
    heads: dict[str, Tensor]
    """Group -> `[prompt layer head]`, float64."""
    attn_biases: dict[str, Tensor]
    """Group -> `[prompt layer]`: the output bias of attention."""
    mlps: dict[str, Tensor]
    """Group -> `[prompt layer]`: the MLP without its output bias (with it, where every expert has one)."""
    mlp_biases: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    """Group -> `[prompt]`: token and position embedding."""
    projections: dict[str, Tensor]
    """Group -> `[prompt]`: the stream itself."""

    def __post_init__(self) -> None:
        for group in self.groups:
            n_prompts, n_layers, _ = self.heads[group].shape
            if n_layers != self.layer or self.projections[group].shape != (n_prompts,):
                raise ValueError(f"attribution of {group!r} does not cover layers 0..{self.layer - 1}")

    def sums(self, group: str) -> Float[Tensor, " prompt"]:
        """The sum of all components of each prompt; equals `projections[group]`."""
        by_layer = self.attn_biases[group] + self.mlps[group] + self.mlp_biases[group] + self.heads[group].sum(-1)
        return self.embeddings[group] + by_layer.sum(-1)

    def largest_error(self) -> float:
        """Largest |sum − projection|, relative to the summed size of the components of that prompt."""
        errors = []
        for group in self.groups:
            size = self.heads[group].abs().sum((1, 2)) + self.embeddings[group].abs()
            size = size + sum(part[group].abs().sum(1) for part in (self.attn_biases, self.mlps, self.mlp_biases))
            errors.append(((self.sums(group) - self.projections[group]).abs() / size).max().item())
        return max(errors)

    def components(self, group: str) -> dict[str, Float[Tensor, " prompt"]]:
        """Every component by name ("L3.H1", "L3.MLP", "L3.attention bias", ..., "embedding") -> one value a prompt."""
        parts = {"embedding": self.embeddings[group]}
        for layer in range(self.layer):
            for head in range(self.heads[group].shape[-1]):
                parts[f"L{layer}.H{head}"] = self.heads[group][:, layer, head]
            parts[f"L{layer}.attention bias"] = self.attn_biases[group][:, layer]
            parts[f"L{layer}.MLP"] = self.mlps[group][:, layer]
            parts[f"L{layer}.MLP bias"] = self.mlp_biases[group][:, layer]
        return parts

    def top_heads(self, n: int, group: str, against: str | None = None) -> tuple[tuple[int, int], ...]:
        """(layer, head) of the largest mean contribution in a group, or of the largest mean difference of two."""
        values = self.heads[group].mean(0)
        if against is not None:
            values = values - self.heads[against].mean(0)
        order = values.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return tuple(divmod(index, values.shape[1]) for index in order)


def attribute_direction(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    groups: Groups,
    *,
    layer: int | None = None,
    position: int = -1,
    batch_size: int = 32,
) -> AttributionResult:
    """⟨x, r̂⟩ at one position of the stream entering `layer`, split into everything that was written before.

    A head contributes c · z_h W_O[h] (g ⊙ r̂), where g is the gain of a norm after attention (ones without one) and
    c the factor that this norm applied at this position, held fixed (Arditi et al. 2024, section 5.1).

    Examples:
        >>> found = attribute_direction(model, chat, direction, {"harmful": harmful, "harmless": harmless})
        >>> figure = plot_attribution(found)

    Args:
        groups: name -> instructions.
        layer: n_layers by default: the stream before the final norm.
        position: counted from the end of the prompt; −1 is the last template token.

    Raises:
        UserError: a group is empty, there is no such layer or position, or the heads' outputs reach the stream
            through more than a norm.
    """
    check_in_stream(direction)
    weights, groups = ModelWeights(model), as_groups(groups)
    layer = model.cfg.n_layers if layer is None else layer
    resid_hook(layer, model.cfg.n_layers)
    columns: dict[str, list[Tensor]] = {}
    for name, instructions in groups.items():
        rows = chat.encode_all(instructions)
        if not rows or position >= 0 or -position > min(map(len, rows)):
            raise UserError(f"group {name!r} has no prompt with a position {position}; positions count from −1 down")
        parts: list[tuple[Tensor, ...]] = [()] * len(rows)
        for indices, batch in batches(model, rows, chat.pad_id, batch_size, description=f"attributing, {name}"):
            split = _split(weights, batch, direction.unit, layer, position)
            for index, values in zip(indices, zip(*split, strict=True), strict=True):
                parts[index] = values
        columns[name] = [torch.stack(column) for column in zip(*parts, strict=True)]
    tables = [{name: columns[name][index] for name in columns} for index in range(6)]
    settings = {"layer": layer, "position": position, "direction": direction.describe()}
    provenance = provenance_of(model, chat, groups, settings)
    return AttributionResult(layer, position, tuple(groups), *tables, provenance=provenance)


def top_heads(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    instructions: Prompts,
    n: int,
    *,
    position: int = -1,
    batch_size: int = 32,
) -> tuple[tuple[int, int], ...]:
    """(layer, head) of those that write most along a direction at one position.

    Examples:
        >>> len(set(top_heads(model, chat, direction, harmful, 3)))
        3
    """
    groups = {"prompts": instructions}
    result = attribute_direction(model, chat, direction, groups, position=position, batch_size=batch_size)
    return result.top_heads(n, "prompts")


def from_run(run: RunInputs) -> AttributionResult:
    """Attribution of the chosen direction on held-out prompts, at the last position before the answer."""
    return attribute_direction(run.model, run.chat, run.direction, prompts_of(run), batch_size=run.batch_size)


def head_contributions(
    weights: ModelWeights,
    layer: int,
    unit: Float[Tensor, " d_model"],
    z: Float[Tensor, "batch head d_head"],
    written: Float[Tensor, "batch d_model"],
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, " batch"], Float[Tensor, "batch head d_head"]]:
    """What a block's heads and its output bias write along `unit`, and the vector that each head is projected with.

    Args:
        z: the heads' outputs before W_O, float64.
        written: what attention added to the stream, float64.
    """
    rows = as_double(weights.head_rows(layer).detach()).cpu()
    bias, gain = weights.bias("attn", layer), weights.gain("attn", layer)
    output = einsum(z, rows, "batch head d_head, head d_head d_model -> batch d_model")
    if bias is not None:
        output = output + bias
    scale = scale_after(output, gain, written)
    factors = "batch, head d_head d_model, d_model -> batch head d_head"
    readout = einsum(scale, rows, gain * unit, factors)
    biases = torch.zeros_like(scale) if bias is None else scale * (bias @ (gain * unit))
    return (z * readout).sum(-1), biases, readout


def scale_after(
    output: Float[Tensor, "batch d_model"], gain: Float[Tensor, " d_model"], written: Float[Tensor, "batch d_model"]
) -> Float[Tensor, " batch"]:
    """The factor c of each row in `written = c · gain ⊙ output`: 1/rms of the norm after it, or a multiplier, or 1.

    Held fixed, it makes the write linear in what the heads computed.

    Raises:
        UserError: the write is not of that form.
    """
    if not bool(torch.isfinite(written).all()):
        raise UserError(
            "the model's activations are not finite on this batch; if it runs in float64, where HF's attention cannot "
            "pad, use float32 or batch_size=1"
        )
    reference = output * gain
    scale = (written * reference).sum(-1) / reference.square().sum(-1).clamp(min=1e-300)
    misfit = (written - scale[:, None] * reference).norm(dim=-1)
    if not bool((misfit <= MAX_MISFIT * written.norm(dim=-1)).all()):
        raise UserError(
            "this model's blocks change the output of their heads by more than a gain, so it does not split into "
            "heads; use patch_activations with the sites attn and mlp"
        )
    return scale


_READ: tuple[BlockPoint, ...] = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")


def _split(
    weights: ModelWeights, batch: TokenBatch, unit: Float[Tensor, " d_model"], layer: int, position: int
) -> tuple[Float[Tensor, "batch ..."], ...]:
    """heads, attn_biases, mlps, mlp_biases, embeddings, projections of one batch."""
    model = weights.model
    target = resid_hook(layer, model.cfg.n_layers)
    names = [EMBEDDING, target]
    for block in range(layer):
        names += [block_hook(block, point) for point in _READ]
        if weights.bias("mlp", block) is not None:
            names.append(mlp_output_hook(model, block))
    taken = captured(model, batch, {name: lambda x: as_double(x[:, position]).cpu() for name in names})
    n, n_heads = len(batch.tokens), model.cfg.n_heads
    heads, attn_biases = torch.zeros(n, layer, n_heads, dtype=torch.float64), torch.zeros(n, layer, dtype=torch.float64)
    mlps, mlp_biases = torch.zeros_like(attn_biases), torch.zeros_like(attn_biases)
    for block in range(layer):
        z, written, mlp = (taken[block_hook(block, point)] for point in _READ)
        heads[:, block], attn_biases[:, block], _ = head_contributions(weights, block, unit, z, written)
        bias, gain = weights.bias("mlp", block), weights.gain("mlp", block)
        if bias is not None:
            scale = scale_after(taken[mlp_output_hook(model, block)], gain, mlp)
            mlp_biases[:, block] = scale * (bias @ (gain * unit))
        mlps[:, block] = mlp @ unit - mlp_biases[:, block]
    return heads, attn_biases, mlps, mlp_biases, taken[EMBEDDING] @ unit, taken[target] @ unit


_UNIT = "⟨write, r̂⟩ (residual stream units)"
_N_RANKED = 16


def plot_attribution(result: AttributionResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean contribution of every head, MLP and bias: first group minus second, or the only group.

    Examples:
        >>> plot_attribution(found).layout.title.text
        'What writes along the direction, up to layer 5, at position −1'

    Raises:
        UserError: no block comes before the layer that is explained.
    """
    if result.layer == 0:
        raise UserError("no block writes into the stream before layer 0; call attribute_direction with a later layer")
    values, what = _contrast(result)
    columns = [f"H{head}" for head in range(values.shape[1] - 3)] + ["MLP", "attention bias", "MLP bias"]
    shown = [index for index, name in enumerate(columns) if "bias" not in name or bool(values[:, index].any())]
    values, columns = values[:, shown], [columns[index] for index in shown]
    hover, limits = "layer %{y}, %{x}<br>%{z:.4f}", draw.symmetric(values)
    digits = min(5, max(1, 2 - math.floor(math.log10(limits[1]))))
    layers = [str(layer) for layer in range(result.layer)]
    figure = go.Figure(draw.heatmap(values, columns, layers, _UNIT, hover=hover, limits=limits, digits=digits))
    draw.categories(figure)
    figure.update_xaxes(title="component")
    figure.update_yaxes(title="layer")
    counts = "n = " + ", ".join(f"{len(result.projections[group])} {group}" for group in result.groups[:2])
    about = draw.subtitle(result.model_name, counts, what, f"embedding {_embedding(result):+.3f}")
    return draw.finish(figure, title=_title(result), about=about, height=max(260, 30 * result.layer), look=look)


def plot_attribution_ranked(result: AttributionResult, **look: Unpack[draw.Look]) -> go.Figure:
    """The components with the largest differences (or means), with 95% intervals over prompts.

    Examples:
        >>> plot_attribution_ranked(found).layout.yaxis.title.text
        'component'
    """
    shown = result.groups[:2]
    by_group = {group: result.components(group) for group in shown}
    means = {name: [by_group[group][name].mean().item() for group in shown] for name in by_group[shown[0]]}
    order = sorted(means, key=lambda name: -abs(means[name][0] - (means[name][1] if len(shown) > 1 else 0.0)))
    names = order[:_N_RANKED]
    figure = go.Figure()
    for index, (group, style) in enumerate(zip(shown, draw.group_styles(shown), strict=True)):
        intervals = [mean_interval(by_group[group][name].tolist()) for name in names]
        name = draw.plain(group)
        label = f"{name} (n = {len(result.projections[group])})"
        figure.add_trace(
            go.Bar(
                y=names,
                x=[mean for mean, _, _ in intervals],
                error_x=draw.interval_bars(intervals, 3),
                orientation="h",
                name=label,
                legendgroup=label,
                marker=draw.bars(index, style),
                hovertemplate=f"<b>{name}</b>, %{{y}}<br>%{{x:.4f}}<extra></extra>",
            )
        )
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    figure.add_vline(0, line={"color": "#1a1a1a", "width": 1})
    figure.update_xaxes(title=_UNIT)
    figure.update_yaxes(title="component", autorange="reversed", automargin=True)
    about = draw.subtitle(result.model_name, "mean and 95% interval over prompts", _sum_note(result))
    height = 30 * len(names) + 20
    return draw.finish(figure, title=_title(result), about=about, height=height, look=look)


def _contrast(result: AttributionResult) -> tuple[Float[Tensor, "layer component"], str]:
    tables = []
    for group in result.groups[:2]:
        parts = (result.mlps, result.attn_biases, result.mlp_biases)
        columns = [result.heads[group].mean(0), *(part[group].mean(0)[:, None] for part in parts)]
        tables.append(torch.cat(columns, dim=1))
    if len(tables) == 1:
        return tables[0], f"mean over {result.groups[0]}"
    return tables[0] - tables[1], f"mean over {result.groups[0]} − mean over {result.groups[1]}"


def _embedding(result: AttributionResult) -> float:
    means = [result.embeddings[group].mean().item() for group in result.groups[:2]]
    return means[0] - (means[1] if len(means) > 1 else 0.0)


def _title(result: AttributionResult) -> str:
    return f"What writes along the direction, up to layer {result.layer}, at position {draw.signed(result.position)}"


def _sum_note(result: AttributionResult) -> str:
    parts = [f"{group} {result.projections[group].mean().item():+.1f}" for group in result.groups[:2]]
    return ("all components sum to " + ", ".join(parts)).replace("-", "−")


FIGURES = {"attribution": plot_attribution, "attribution_ranked": plot_attribution_ranked}

call_with_a_run(__name__)
