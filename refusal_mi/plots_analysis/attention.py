"""Where the heads that write the direction look."""

import circuitsvis
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..analysis.attention import AttentionResult
from ..plots.style import finish
from ..stats import mean_interval
from .pages import View, page, shown_tokens
from .parts import WIDTH, bars, heatmap, subtitle


def plot_attention(result: AttentionResult) -> go.Figure:
    """Attention by region, and what is written along the direction from each, mean over heads and prompts."""
    titles = ["<b>attention</b>", "<b>written along the direction, all heads</b>"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    tables = (result.mass.mean(2), result.contributions.sum(2))
    for index, variant in enumerate(result.variants):
        for column, table in enumerate(tables, start=1):
            trace = _bars(result, variant, table[index], index, "%{y:.3f}" if column == 1 else "%{y:.4f}")
            trace.showlegend = column == 1
            figure.add_trace(trace, row=1, col=column)
    figure.update_yaxes(title="attention (fraction)", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title="⟨write, r̂⟩ (residual stream units)", row=1, col=2)
    figure.add_hline(0, line={"color": "#1a1a1a", "width": 1}, row=1, col=2)
    figure.update_xaxes(title="region of the prompt")
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    figure.update_annotations(font_size=13)
    heads = ", ".join(f"L{layer}.H{head}" for layer, head in result.heads)
    about = subtitle(result.model_name, f"n = {result.n_prompts} prompts, 95% intervals", f"heads {heads}")
    title = "Where the heads that write the direction look from the last position"
    names = list(result.variants)
    return finish(figure, title=title, about=about, height=340, legend_names=names, width=WIDTH, top=104)


def plot_attention_heads(result: AttentionResult) -> go.Figure:
    """Mean attention of each head by region, one panel a variant."""
    titles = [f"<b>{variant}</b>" for variant in result.variants]
    figure = make_subplots(1, len(titles), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    rows = [f"L{layer}.H{head}" for layer, head in result.heads]
    for column, values in enumerate(result.mass.mean(1), start=1):
        hover = "%{y}, %{x}<br>%{z:.4f}"
        trace = heatmap(values, result.regions, rows, "attention (fraction)", hover=hover, limits=(0.0, 1.0))
        trace.showscale = column == len(titles)
        figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title="region of the prompt", type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="head", col=1)
    figure.update_annotations(font_size=13)
    about = subtitle(result.model_name, f"n = {result.n_prompts} prompts, mean attention from the last position")
    height = max(220, 34 * len(rows))
    title = "Attention of each head by region"
    return finish(figure, title=title, about=about, height=height, legend_names=[], width=WIDTH, top=104)


def attention_page(result: AttentionResult) -> str:
    """The whole attention patterns of the heads on the first prompt, with the suffix."""
    names = [f"L{layer}.H{head}" for layer, head in result.heads]
    view = circuitsvis.attention.attention_heads(
        result.example_pattern, shown_tokens(result.example_tokens), names, mask_upper_tri=True
    )
    about = f"{result.model_name} · first prompt with the given suffix"
    return page("Attention patterns of the heads that write the direction", about, [View("Heads", view)])


def _bars(
    result: AttentionResult, variant: str, values: Float[Tensor, "prompt region"], index: int, number: str
) -> go.Bar:
    found = [mean_interval(column.tolist()) for column in values.T]
    counts = result.n_tokens[index].mean(0).tolist()
    return go.Bar(
        x=list(result.regions),
        y=[mean for mean, _, _ in found],
        error_y={
            "array": [high - mean for mean, _, high in found],
            "arrayminus": [mean - low for mean, low, _ in found],
            "thickness": 1.2,
            "width": 4,
        },
        name=variant,
        legendgroup=variant,
        marker=bars(index),
        customdata=counts,
        hovertemplate=f"<b>{variant}</b>, %{{x}} (%{{customdata:.1f}} tokens)<br>{number}<extra></extra>",
    )


FIGURES = {"attention": plot_attention, "attention_heads": plot_attention_heads, "attention_patterns": attention_page}
