"""Which tokens of the prompt a head reads what it writes along a direction from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..directions import Direction
from ..errors import UserError
from ..model.running import batches
from ..models import HookedModel
from ..precision import as_double
from ..reading import captured
from ..tokens import TokenBatch
from .attribution import attribute_direction, head_contributions
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of
from .writers import ModelWeights

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
