"""Which tokens of the prompt a head reads what it writes along a direction from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import circuitsvis
import plotly.graph_objects as go
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..figures.views import SIGNS, Page, View, page, shown_tokens
from ..model.points import BlockPoint, HookedModel, block_hook
from ..model.readers import ModelWeights
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..run.folder import RunInputs
from ..text.batches import TokenBatch
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .attribution import head_contributions, top_heads
from .result import AnalysisResult, call_with_a_run, provenance_of

N_PROMPTS, N_HEADS = 6, 8


@dataclass(frozen=True, eq=False, repr=False)
class SourcesResult(AnalysisResult):
    """What some heads write along a unit direction at one position, split by the token it was read from.

    Examples:
        >>> found.contributions.shape == found.pattern.shape, found.heads
        (True, ((1, 0), (3, 2)))
        >>> found.pattern.nansum(-1).allclose(torch.ones(()).double(), atol=1e-5)
        True
    """

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
    instructions: Prompts,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    n_heads: int = N_HEADS,
    position: int = -1,
    batch_size: int = 8,
) -> SourcesResult:
    """Contribution of each head at `position`, Σ_s pattern[s] · c · v_s W_O[h] (g ⊙ r̂), by source token s.

    Grouped-query heads share values. The value bias counts with the tokens, the output bias with no head.

    Examples:
        >>> figure = plot_sources(attribute_sources(model, chat, direction, harmful, heads=[(1, 0), (3, 2)]))

    Args:
        heads: (layer, head); by default the `n_heads` with the largest mean contribution to the final stream.

    Raises:
        UserError: there are no prompts, or a head does not exist.
    """
    check_in_stream(direction)
    instructions = as_prompts(instructions)
    if heads is None:
        heads = top_heads(model, chat, direction, instructions, n_heads, position=position, batch_size=batch_size)
    rows = chat.encode_all(instructions)
    contributions, patterns = split_by_source(
        model, rows, direction.unit, heads, pad_id=chat.pad_id, position=position, batch_size=batch_size
    )
    width = contributions.shape[-1]
    tokens = [chat.tokenizer.convert_ids_to_tokens(row) for row in rows]
    padded = tuple(("",) * (width - len(row)) + tuple(row) for row in tokens)
    settings = {"position": position, "direction": direction.describe()}
    provenance = provenance_of(model, chat, {"prompts": instructions}, settings)
    return SourcesResult(tuple(heads), position, padded, contributions, patterns, provenance=provenance)


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
    """Contribution and attention of each head by source token, rows left-padded to the longest with zeros.

    Raises:
        UserError: a head does not exist.
    """
    n_layers, n_heads, width = model.cfg.n_layers, model.cfg.n_heads, max(map(len, rows))
    outside = [(layer, head) for layer, head in heads if not (0 <= layer < n_layers and 0 <= head < n_heads)]
    if outside:
        raise UserError(f"no head {outside[0]}: this model has {n_layers} layers of {n_heads} heads")
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
    readers: dict[BlockPoint, Callable[[Tensor], Tensor]] = {
        "attn.hook_z": lambda x: as_double(x[:, position]).cpu(),
        "hook_attn_out": lambda x: as_double(x[:, position]).cpu(),
        "attn.hook_pattern": lambda x: as_double(x[:, :, position]).cpu(),
        "attn.hook_v": lambda x: as_double(x).cpu(),
    }
    wanted = {block_hook(layer, point): reader for layer in layers for point, reader in readers.items()}
    taken = captured(weights.model, batch, wanted)
    mask = batch.mask.cpu()[:, None].bool()
    by_layer = {}
    for layer in layers:
        z, written, pattern, values = (taken[block_hook(layer, point)] for point in readers)
        _, _, readout = head_contributions(weights, layer, unit, z, written)
        n_shared = z.shape[1] // values.shape[2]
        values = repeat(values, "batch pos kv d_head -> batch pos (kv shared) d_head", shared=n_shared)
        along = einsum(values, readout, "batch pos head d_head, batch head d_head -> batch head pos")
        pattern = pattern.masked_fill(~mask, 0)
        by_layer[layer] = (pattern * along, pattern)
    contributions = torch.stack([by_layer[layer][0][:, head] for layer, head in heads], dim=1)
    return contributions, torch.stack([by_layer[layer][1][:, head] for layer, head in heads], dim=1)


_UNIT = "⟨write, r̂⟩ (residual stream units)"
_MAX_LABELLED = 60


def plot_sources(result: SourcesResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Contribution of each head by source token, for the first prompt.

    Examples:
        >>> plot_sources(found).layout.title.text
        'Where in the prompt the heads read the direction from'
    """
    tokens, values = _unpadded(result, 0)
    columns = [f"{index}" for index in range(len(tokens))]
    names = [draw.plain(draw.token_text(token)) for token in tokens]
    custom = [[[name] for name in names] for _ in result.heads]
    hover = "%{y} reads from %{customdata[0]}<br>%{z:.4f}"
    rows, limits = draw.head_names(result.heads), draw.symmetric(values)
    figure = go.Figure(draw.heatmap(values, columns, rows, _UNIT, hover=hover, custom=custom, limits=limits))
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
    about = draw.subtitle(
        result.model_name, f"prompt 1 of {len(result.tokens)}, written at position {draw.signed(result.position)}"
    )
    title = "Where in the prompt the heads read the direction from"
    height = max(200, 34 * len(rows))
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def sources_page(result: SourcesResult) -> Page:
    """Colored tokens of every prompt: all heads together, then each by itself, on one scale for both signs.

    Examples:
        >>> sources_page(found).startswith("<!doctype html>")
        True
    """
    largest = max(float(result.contributions.sum(1).abs().max()), float(result.contributions.abs().max()), 1e-12)
    views = []
    for index in range(len(result.tokens)):
        tokens, values = _unpadded(result, index)
        rows = {"all shown heads": values.sum(0)}
        rows |= dict(zip(draw.head_names(result.heads), values, strict=True))
        for name, row in rows.items():
            view = circuitsvis.tokens.colored_tokens(shown_tokens(tokens), row, min_value=-largest, max_value=largest)
            views.append(View(f"Prompt {index + 1}, {name}", view))
    place = f"written at position {draw.signed(result.position)}"
    scale = f"{SIGNS}, up to ±{largest:.3g}"
    about = f"{result.model_name} · {len(result.tokens)} prompts · {_UNIT}, {place} · {scale}"
    return page("Where in the prompt the heads read the direction from", about, views)


def _unpadded(result: SourcesResult, prompt: int) -> tuple[list[str], Float[Tensor, "head pos"]]:
    tokens = [token for token in result.tokens[prompt] if token]
    return tokens, result.contributions[prompt, :, -len(tokens) :]


FIGURES = {"sources": plot_sources, "sources_tokens": sources_page}

call_with_a_run(__name__)
