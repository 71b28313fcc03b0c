"""Which weights write a direction into the stream and which read it, against random directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..models import HookedModel
from ..parts import norm_before, readers
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of
from .writers import ModelWeights, NormMap, norms_along


@dataclass(frozen=True)
class WeightsResult(AnalysisResult):
    """How strongly each writer and reader is aligned with a direction."""

    kind: ClassVar[str] = "weights"
    units: ClassVar[Mapping[str, str]] = {
        "writes": "residual stream units along the unit direction per unit of input (norm over inputs)",
        "reads": "units of output per unit direction in the normed stream (norm over outputs)",
        "writes_null_p95": "as writes",
        "reads_null_p95": "as reads",
    }

    writes: Float[Tensor, "layer writer"]
    """‖(g ⊙ r̂)ᵀ W_O[h]‖ of every head and ‖(g ⊙ r̂)ᵀ W_out‖ of the MLP; g is 1 without a post-norm."""
    reads: Float[Tensor, "layer reader"]
    """‖W (g ⊙ r̂)‖ of every reader, g the gain of the norm before it."""
    writes_null_mean: Float[Tensor, "layer writer"]
    """Mean over random unit directions."""
    writes_null_p95: Float[Tensor, "layer writer"]
    reads_null_mean: Float[Tensor, "layer reader"]
    reads_null_p95: Float[Tensor, "layer reader"]
    writer_names: tuple[str, ...]
    reader_names: tuple[str, ...]
    n_random: int
    direction_layer: int
    direction_position: int | None

    def __post_init__(self) -> None:
        widths = self.writes.shape[1], self.reads.shape[1]
        if widths != (len(self.writer_names), len(self.reader_names)):
            raise ValueError(f"{widths} columns for {len(self.writer_names)} writers, {len(self.reader_names)} readers")

    def ratio(self, side: Literal["writes", "reads"]) -> Float[Tensor, "layer component"]:
        """The norms over those of a random direction: 1 is chance."""
        if side == "writes":
            return self.writes / self.writes_null_mean
        return self.reads / self.reads_null_mean


def weight_alignment(model: HookedModel, direction: Direction, *, n_random: int = 100, seed: int = 0) -> WeightsResult:
    """‖r̂ᵀW_O[h]‖ and ‖r̂ᵀW_out‖ of every layer, and ‖W r̂‖ of every reader, beside their null.

    Before a post-norm of gain g the write along r̂ is (g ⊙ r̂)ᵀW up to that norm's scale. Experts of a mixture are
    taken together.

    Args:
        n_random: random unit directions of the null.
    """
    if n_random < 2:
        raise UserError(f"the null needs at least 2 random directions, not {n_random}")
    weights = ModelWeights(model)
    controls = [direction.random_like(seed + index).unit for index in range(n_random)]
    vectors = torch.stack([direction.unit, *controls])
    layers = range(model.cfg.n_layers)
    writes = torch.stack([_writes(weights, layer, vectors) for layer in layers])
    found = [_reads(weights, layer, vectors) for layer in layers]
    names = tuple(found[0])
    reads = torch.stack([torch.stack([row[name] for name in names]) for row in found])
    writer_names = (*(f"H{head}" for head in range(model.cfg.n_heads)), "MLP")
    return WeightsResult(
        writes[..., 0],
        reads[..., 0],
        writes[..., 1:].mean(-1),
        writes[..., 1:].quantile(0.95, dim=-1),
        reads[..., 1:].mean(-1),
        reads[..., 1:].quantile(0.95, dim=-1),
        writer_names,
        names,
        n_random,
        direction.layer,
        direction.position,
        provenance=provenance_of(
            model, None, {}, {"seed": seed, "n_random": n_random, "direction": direction.describe()}
        ),
    )


def from_run(run: RunInputs) -> WeightsResult:
    """The weights against the direction of a run."""
    return weight_alignment(run.model, run.direction, seed=run.seed)


def _writes(
    weights: ModelWeights, layer: int, vectors: Float[Tensor, "vector d_model"]
) -> Float[Tensor, "writer vector"]:
    heads = [norms_along(rows, vectors * weights.gain("attn", layer)) for rows in weights.head_rows(layer)]
    seen = vectors * weights.gain("mlp", layer)
    mlp = [norms_along(weights.written_rows(writer), seen) for writer in weights.writers("mlp", layer)]
    return torch.stack([*heads, _together(mlp)])


def _reads(
    weights: ModelWeights, layer: int, vectors: Float[Tensor, "vector d_model"]
) -> dict[str, Float[Tensor, " vector"]]:
    model, found = weights.model, {}
    like = weights.unembedding
    for name, module in readers(model, layer).items():
        norm = norm_before(model, layer, "attn" if name in "qkv" else "mlp")
        seen = _normed(norm, model, vectors).to(like.dtype).to(like.device)
        with torch.no_grad():
            read = module(seen[None])[0] - module(torch.zeros_like(seen[:1])[None])[0]
        found[name] = read.double().cpu().norm(dim=-1)
    experts = weights.expert_readers(layer)
    if experts is not None:
        found["experts"] = norms_along(experts, _normed(norm_before(model, layer, "mlp"), model, vectors))
    return found


def _normed(norm: object, model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Tensor:
    return vectors if norm is None else NormMap.of(norm, model).apply(vectors)


def _together(norms: Sequence[Float[Tensor, " vector"]]) -> Float[Tensor, " vector"]:
    return torch.stack(list(norms)).square().sum(0).sqrt()
