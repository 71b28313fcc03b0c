"""Which tokens of the prompt a head reads what it writes along a direction from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import circuitsvis
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..figures.style import (
    SIGNS,
    WIDTH,
    View,
    finish,
    heatmap,
    page,
    plain,
    shown_tokens,
    signed,
    subtitle,
    token_text,
    with_room_below,
)
from ..model.points import HookedModel
from ..model.readers import ModelWeights
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..run.record import RunInputs
from ..text.batches import TokenBatch
from ..text.chat import ChatFormat
from .attribution import attribute_direction, head_contributions
from .result import AnalysisResult, provenance_of

N_PROMPTS, N_HEADS = 6, 8


@dataclass(frozen=True)
class SourcesResult(AnalysisResult):
    """What some heads write along a unit direction at one position, split by the token it was read from."""

    kind: ClassVar[str] = "sources"
    units: ClassVar[Mapping[str, str]] = {
        "contributions": "residual stream units along the unit direction",
        "pattern": "attention (fraction)",
    }

    heads: tuple[tuple[int, int], ...]
    """(layer, head)."""
    position: int
    tokens: tuple[tuple[str, ...], ...]
    """Per prompt, left-padded with empty strings to the longest."""
    contributions: Float[Tensor, "prompt head pos"]
    """float64; 0 under the padding."""
    pattern: Float[Tensor, "prompt head pos"]
    """The attention that the heads pay to each token, float64."""

    def __post_init__(self) -> None:
        shape = (len(self.tokens), len(self.heads), len(self.tokens[0]))
        if self.contributions.shape != shape or self.pattern.shape != shape:
            raise ValueError(
                f"sources of {shape} (prompts, heads, tokens) have shape {tuple(self.contributions.shape)}"
            )


def attribute_sources(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    instructions: Sequence[str],
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    n_heads: int = N_HEADS,
    position: int = -1,
    batch_size: int = 8,
) -> SourcesResult:
    """Contribution of each head at `position`, Σ_s pattern[s] · c · v_s W_O[h] (g ⊙ r̂), by source token s.

    Grouped-query heads share values. The value bias counts with the tokens, the output bias with no head.

    Args:
        heads: (layer, head); by default the `n_heads` with the largest mean contribution to the final stream.

    Raises:
        UserError: there are no prompts, or a head does not exist.
    """
    if heads is None:
        found = attribute_direction(
            model, chat, direction, {"prompts": instructions}, position=position, batch_size=batch_size
        )
        heads = found.top_heads(n_heads, "prompts")
    outside = [head for head in heads if not (0 <= head[0] < model.cfg.n_layers and 0 <= head[1] < model.cfg.n_heads)]
    if outside:
        raise UserError(
            f"no head {outside[0]}: this model has {model.cfg.n_layers} layers of {model.cfg.n_heads} heads"
        )
    rows = [chat.encode(instruction) for instruction in instructions]
    contributions, patterns = split_by_source(
        model, rows, direction.unit, heads, pad_id=chat.pad_id, position=position, batch_size=batch_size
    )
    width = contributions.shape[-1]
    tokens = [chat.tokenizer.convert_ids_to_tokens(row) for row in rows]
    padded = tuple(("",) * (width - len(row)) + tuple(row) for row in tokens)
    settings = {"position": position, "direction": direction.describe()}
    provenance = provenance_of(model, chat, {"prompts": instructions}, settings)
    return SourcesResult(
        tuple((layer, head) for layer, head in heads), position, padded, contributions, patterns, provenance=provenance
    )


def from_run(run: RunInputs) -> SourcesResult:
    """The sources of the top heads on a few held-out harmful prompts."""
    prompts = run.prompts("harmful", "test")[:N_PROMPTS]
    return attribute_sources(run.model, run.chat, run.direction, prompts, batch_size=run.batch_size)


def split_by_source(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    unit: Float[Tensor, " d_model"],
    heads: Sequence[tuple[int, int]],
    *,
    pad_id: int,
    position: int,
    batch_size: int,
) -> tuple[Float[Tensor, "prompt head pos"], Float[Tensor, "prompt head pos"]]:
    """Contribution and attention of each head by source token, rows left-padded to the longest with zeros."""
    width = max(map(len, rows))
    weights = ModelWeights(model)
    contributions = torch.zeros(len(rows), len(heads), width, dtype=torch.float64)
    patterns = torch.zeros_like(contributions)
    for indices, batch in batches(model, rows, pad_id, batch_size, description="attributing to tokens"):
        here = indices, slice(None), slice(width - batch.tokens.shape[1], None)
        contributions[here], patterns[here] = _split(weights, batch, unit, heads, position)
    return contributions, patterns


def _split(
    weights: ModelWeights,
    batch: TokenBatch,
    unit: Float[Tensor, " d_model"],
    heads: Sequence[tuple[int, int]],
    position: int,
) -> tuple[Float[Tensor, "batch head pos"], Float[Tensor, "batch head pos"]]:
    layers = sorted({layer for layer, _ in heads})
    readers = {}
    for layer in layers:
        readers[f"blocks.{layer}.attn.hook_z"] = lambda x: as_double(x[:, position]).cpu()
        readers[f"blocks.{layer}.hook_attn_out"] = lambda x: as_double(x[:, position]).cpu()
        readers[f"blocks.{layer}.attn.hook_pattern"] = lambda x: as_double(x[:, :, position]).cpu()
        readers[f"blocks.{layer}.attn.hook_v"] = lambda x: as_double(x).cpu()
    found = captured(weights.model, batch, readers)
    mask = batch.mask.cpu()[:, None].bool()
    by_layer = {}
    for layer in layers:
        z, written = found[f"blocks.{layer}.attn.hook_z"], found[f"blocks.{layer}.hook_attn_out"]
        _, _, readout = head_contributions(weights, layer, unit, z, written)
        values = found[f"blocks.{layer}.attn.hook_v"]
        values = values.repeat_interleave(z.shape[1] // values.shape[2], dim=2)
        pattern = found[f"blocks.{layer}.attn.hook_pattern"].masked_fill(~mask, 0)
        by_layer[layer] = (pattern * torch.einsum("bphk,bhk->bhp", values, readout), pattern)
    contributions = torch.stack([by_layer[layer][0][:, head] for layer, head in heads], dim=1)
    return contributions, torch.stack([by_layer[layer][1][:, head] for layer, head in heads], dim=1)


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
