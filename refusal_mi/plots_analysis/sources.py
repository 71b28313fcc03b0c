"""Which tokens the heads read from what they write along the direction."""

import circuitsvis
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from ..analysis.sources import SourcesResult
from ..plots.style import finish, plain, token_text
from .pages import SIGNS, View, page, shown_tokens
from .parts import WIDTH, heatmap, signed, subtitle, with_room_below

_UNIT = "⟨write, r̂⟩ (residual stream units)"
_MAX_LABELLED = 60


def plot_sources(result: SourcesResult) -> go.Figure:
    """Contribution of each head by source token, for the first prompt."""
    tokens, values = _unpadded(result, 0)
    largest = max(float(values.abs().max()), 1e-12)
    columns = [f"{index}" for index in range(len(tokens))]
    names = [plain(token_text(token)) for token in tokens]
    custom = [[[name] for name in names] for _ in result.heads]
    hover = "%{y} reads from %{customdata[0]}<br>%{z:.4f}"
    rows = [f"L{layer}.H{head}" for layer, head in result.heads]
    figure = go.Figure(heatmap(values, columns, rows, _UNIT, hover=hover, custom=custom, limits=(-largest, largest)))
    figure.data[0].texttemplate = None
    step = max(1, -(-len(tokens) // _MAX_LABELLED))
    ticks = list(range(0, len(tokens), step))
    figure.update_xaxes(
        title="token of the prompt",
        type="category",
        tickvals=[columns[index] for index in ticks],
        ticktext=[names[index] for index in ticks],
        tickangle=-60,
    )
    figure.update_yaxes(title="head", type="category", autorange="reversed")
    about = subtitle(
        result.model_name, f"prompt 1 of {len(result.tokens)}, written at position {signed(result.position)}"
    )
    title = "Where in the prompt the heads read the direction from"
    height = max(200, 34 * len(rows))
    figure = finish(figure, title=title, about=about, height=height, legend_names=[], width=WIDTH)
    return with_room_below(figure, [token_text(token) for token in tokens], 0.87)


def sources_page(result: SourcesResult) -> str:
    """Colored tokens of every prompt: all heads together, then each by itself, on one scale for both signs."""
    largest = max(float(result.contributions.sum(1).abs().max()), float(result.contributions.abs().max()), 1e-12)
    views = []
    for index in range(len(result.tokens)):
        tokens, values = _unpadded(result, index)
        rows = {"all shown heads": values.sum(0)}
        rows |= {f"L{layer}.H{head}": values[row] for row, (layer, head) in enumerate(result.heads)}
        for name, row in rows.items():
            view = circuitsvis.tokens.colored_tokens(shown_tokens(tokens), row, min_value=-largest, max_value=largest)
            views.append(View(f"Prompt {index + 1}, {name}", view))
    place = f"written at position {signed(result.position)}"
    scale = f"{SIGNS}, up to ±{largest:.3g}"
    about = f"{result.model_name} · {len(result.tokens)} prompts · {_UNIT}, {place} · {scale}"
    return page("Where in the prompt the heads read the direction from", about, views)


def _unpadded(result: SourcesResult, prompt: int) -> tuple[list[str], Float[Tensor, "head pos"]]:
    tokens = [token for token in result.tokens[prompt] if token]
    return tokens, result.contributions[prompt, :, -len(tokens) :]


FIGURES = {"sources": plot_sources, "sources_tokens": sources_page}
