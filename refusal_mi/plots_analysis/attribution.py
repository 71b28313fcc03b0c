"""Which components write along the direction: all of them as a map, the largest as ranked bars."""

import math

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..analysis.attribution import AttributionResult
from ..errors import UserError
from ..plots.style import finish
from ..stats import mean_interval
from .parts import WIDTH, bars, heatmap, signed, subtitle

_UNIT = "⟨write, r̂⟩ (residual stream units)"
_N_RANKED = 16


def plot_attribution(result: AttributionResult) -> go.Figure:
    """Mean contribution of every head, MLP and bias: first group minus second, or the only group.

    Raises:
        UserError: no block comes before the layer that is explained.
    """
    if result.layer == 0:
        raise UserError("no block writes into the stream before layer 0; call attribute_direction with a later layer")
    values, what = _contrast(result)
    columns = [f"H{head}" for head in range(values.shape[1] - 3)] + ["MLP", "attention bias", "MLP bias"]
    shown = [index for index, name in enumerate(columns) if "bias" not in name or bool(values[:, index].any())]
    values, columns = values[:, shown], [columns[index] for index in shown]
    largest = max(float(values.abs().max()), 1e-12)
    hover = "layer %{y}, %{x}<br>%{z:.4f}"
    digits = min(5, max(1, 2 - math.floor(math.log10(largest))))
    layers = [str(layer) for layer in range(result.layer)]
    figure = go.Figure(heatmap(values, columns, layers, _UNIT, hover=hover, limits=(-largest, largest), digits=digits))
    figure.update_xaxes(title="component", type="category")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    about = subtitle(result.model_name, _counts(result), what, f"embedding {_embedding(result):+.3f}")
    height = max(260, 30 * result.layer)
    return finish(figure, title=_title(result), about=about, height=height, legend_names=[], width=WIDTH)


def plot_attribution_ranked(result: AttributionResult) -> go.Figure:
    """The components with the largest differences (or means), with 95% intervals over prompts."""
    shown = result.groups[:2]
    by_group = {group: result.components(group) for group in shown}
    means = {name: [by_group[group][name].mean().item() for group in shown] for name in by_group[shown[0]]}
    order = sorted(means, key=lambda name: -abs(means[name][0] - (means[name][1] if len(shown) > 1 else 0.0)))
    names = order[:_N_RANKED]
    figure, legend = go.Figure(), []
    for index, group in enumerate(shown):
        found = [mean_interval(by_group[group][name].tolist()) for name in names]
        label = f"{group} (n = {len(result.projections[group])})"
        legend.append(label)
        figure.add_trace(
            go.Bar(
                y=names,
                x=[mean for mean, _, _ in found],
                error_x={
                    "array": [high - mean for mean, _, high in found],
                    "arrayminus": [mean - low for mean, low, _ in found],
                    "thickness": 1.2,
                    "width": 3,
                },
                orientation="h",
                name=label,
                legendgroup=label,
                marker=bars(index),
                hovertemplate=f"<b>{group}</b>, %{{y}}<br>%{{x:.4f}}<extra></extra>",
            )
        )
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    figure.add_vline(0, line={"color": "#1a1a1a", "width": 1})
    figure.update_xaxes(title=_UNIT)
    figure.update_yaxes(title="component", autorange="reversed", automargin=True)
    about = subtitle(result.model_name, "mean and 95% interval over prompts", _sum_note(result))
    height = 30 * len(names) + 20
    return finish(figure, title=_title(result), about=about, height=height, legend_names=legend, width=WIDTH)


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
    return f"What writes along the direction, up to layer {result.layer}, at position {signed(result.position)}"


def _counts(result: AttributionResult) -> str:
    return "n = " + ", ".join(f"{len(result.projections[group])} {group}" for group in result.groups[:2])


def _sum_note(result: AttributionResult) -> str:
    parts = [f"{group} {result.projections[group].mean().item():+.1f}" for group in result.groups[:2]]
    return ("all components sum to " + ", ".join(parts)).replace("-", "−")


FIGURES = {"attribution": plot_attribution, "attribution_ranked": plot_attribution_ranked}
