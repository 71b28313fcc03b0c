"""The weights that write into the stream and those that read it, of a loaded model, in HF coordinates."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..export.classify import Layout, Writer, build_skeleton, classify
from ..export.families import FAMILIES
from ..models import Component, HookedModel, check_raw_basis
from ..parts import named_weights

_CHUNK = 4096
_LONG = 1e3


@dataclass(frozen=True)
class ModelWeights:
    """A model's tensors by what they do to the stream."""

    model: HookedModel

    def __post_init__(self) -> None:
        check_raw_basis(self.model)

    @cached_property
    def layout(self) -> Layout:
        """Which tensors write, along which axis, and which norm comes after.

        Raises:
            UserError: nobody has said so for this type of model.
        """
        config = self.model.original_model.config  # type: ignore[attr-defined]
        if config.model_type not in FAMILIES:
            raise UserError(
                f"this analysis reads weights, and which of them write into the stream is not known for model type "
                f"{config.model_type!r}; project_residuals, linear_probes and patch_activations read activations only"
            )
        skeleton = build_skeleton(config)
        return classify(config, {name: tuple(p.shape) for name, p in skeleton.named_parameters()}, skeleton=skeleton)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """Every parameter by its name in the HF checkpoint."""
        return named_weights(self.model)

    def writers(self, component: Component, layer: int) -> list[Writer]:
        """The weight tensors (biases apart) that write for a component of a block."""
        found = self.layout.writers
        return [w for w in found if w.component == component and w.layer == layer and not w.is_bias]

    def written_rows(self, writer: Writer) -> Float[Tensor, "feature d_model"]:
        """What one unit of each of a writer's inputs adds to the stream, before a post-norm."""
        tensor = self.named[writer.name].detach()
        return tensor.movedim(writer.axis, -1).reshape(-1, tensor.shape[writer.axis])

    def gain(self, component: Component, layer: int) -> Float[Tensor, " d_model"]:
        """What multiplies a component's output on its way into the stream: post-norm gain and residual scale."""
        writer = self.writers(component, layer)[0]
        gain = torch.ones(self.layout.d_model, dtype=torch.float64)
        if writer.post_norm is not None:
            gain = self.named[writer.post_norm].detach().cpu().double() + self.layout.family.gain_offset
        return gain * self.layout.residual_scale

    def bias(self, component: Component, layer: int) -> Float[Tensor, " d_model"] | None:
        """What a component adds to its output before a post-norm; None without one, or where every expert has one."""
        found = [w for w in self.layout.writers if w.component == component and w.layer == layer and w.is_bias]
        tensors = [self.named[writer.name] for writer in found]
        return tensors[0].detach().cpu().double() if tensors and tensors[0].ndim == 1 else None

    def head_rows(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of every head of a block, before a post-norm."""
        (writer,) = self.writers("attn", layer)
        rows = self.written_rows(writer)
        return rows.reshape(self.model.cfg.n_heads, -1, rows.shape[-1])

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_U, by rows."""
        return self.named[self.layout.token_embedding if self.layout.is_tied else self.layout.head].detach()

    def expert_readers(self, layer: int) -> Float[Tensor, "feature d_model"] | None:
        """What a block's fused experts read, None where there are none."""
        (writer, *_) = self.writers("mlp", layer)
        name = writer.name.replace("down_proj", "gate_up_proj")
        if "experts" not in name or name not in self.named:
            return None
        tensor, axis = self.named[name].detach(), 3 - self.layout.family.expert_axis
        return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


@dataclass(frozen=True)
class NormMap:
    """The linear part of a norm: x → gain ⊙ (x − mean x), or without the mean, its division by a length apart."""

    gain: Float[Tensor, " d_model"]
    is_centered: bool

    @classmethod
    def of(cls, norm: Any, model: HookedModel) -> "NormMap":
        """Measure it: a long vector of alternating signs has mean 0 and any norm returns its gain."""
        like = next(iter(named_weights(model).values()))
        signs = torch.ones(model.cfg.d_model, dtype=like.dtype, device=like.device)
        signs[1::2] = -1
        probes = torch.stack([_LONG * signs, _LONG * signs.abs(), torch.zeros_like(signs)])
        with torch.no_grad():
            alternating, constant, zero = norm(probes[None])[0].double().cpu()
        gain = (alternating - zero) * signs.double().cpu()
        return cls(gain, bool((constant - zero).norm() < 0.01 * gain.norm()))

    def apply(self, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector d_model"]:
        """gain ⊙ (v − mean v), or gain ⊙ v."""
        double = vectors.double()
        return self.gain * (double - double.mean(-1, keepdim=True) if self.is_centered else double)


def norms_along(
    rows: Float[Tensor, "feature d_model"], vectors: Float[Tensor, "vector d_model"]
) -> Float[Tensor, " vector"]:
    """‖rows · v‖ for each vector, in float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64)
    for piece in rows.split(_CHUNK):
        total += (piece.cpu().double() @ vectors.double().T).square().sum(0)
    return total.sqrt()
