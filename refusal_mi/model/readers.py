"""The weights of a loaded model by what they do to the stream: who writes into it, who reads it, through which norm."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..values import Value
from .families import FAMILIES, text_config
from .hooked import hf_weights, is_hooked_transformer, linear_maps, norm_of
from .points import (
    Component,
    HookedModel,
    block_hook,
    bridge,
    check_raw_basis,
    hf_config,
    missing_points,
    parameters_of,
    quantization_of,
)
from .writers import Layout, Writer, build_skeleton, classify

Norm = Callable[[Tensor], Tensor]
_CHUNK = 4096
_LONG = 1e3


def named_weights(model: HookedModel) -> dict[str, Tensor]:
    """Every parameter, by its name in the HF checkpoint."""
    if is_hooked_transformer(model):
        return hf_weights(model)
    named = bridge(model).original_model.named_parameters(remove_duplicate=False)
    return {name.replace("._original_component", ""): parameter for name, parameter in named}


def norm_before(model: HookedModel, layer: int, component: Literal["attn", "mlp"]) -> Norm | None:
    """The norm through which a component of block `layer` reads the stream; None where it reads it as it is."""
    block = bridge(model).blocks[layer]
    if is_hooked_transformer(model):
        return norm_of(block, component)
    is_shared = component == "mlp" and not hasattr(block, "ln2") and not hasattr(block, "ln2_post")
    return getattr(block, "ln1" if component == "attn" or is_shared else "ln2", None)


def final_norm(model: HookedModel) -> Norm:
    """The norm before the unembedding."""
    return bridge(model).ln_final


def readers(model: HookedModel, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The linear maps of block `layer` that read the normed stream: q, k, v and what the MLP has of gate and in."""
    block = bridge(model).blocks[layer]
    if is_hooked_transformer(model):
        return linear_maps(block)
    dense = dict(block.mlp.named_children()) if hasattr(block.mlp, "out") else {}
    of_attention = {name: getattr(block.attn, name) for name in ("q", "k", "v")}
    return of_attention | {name: dense[name] for name in ("gate", "in") if name in dense}


@dataclass(frozen=True)
class ModelWeights:
    """A model's tensors by what they do to the stream."""

    model: HookedModel

    def __post_init__(self) -> None:
        check_raw_basis(self.model)
        if getattr(self.model, "compatibility_mode", False):
            raise ValueError("this model is in compatibility mode: its weights are not those of the checkpoint")
        is_away = any(parameter.is_meta for parameter in parameters_of(self.model))
        if is_away or (method := quantization_of(self.model)) is not None:
            reason = "and a part of them is offloaded" if is_away else f"and these are quantized ({method})"
            raise UserError(f"this analysis reads weights, {reason}: load the model whole, in its own precision")

    @cached_property
    def layout(self) -> Layout:
        """Which tensors write, along which axis, and which norm comes after.

        Raises:
            UserError: nobody has said so for this type of model.
        """
        config = hf_config(self.model)
        kind = text_config(config).model_type
        if kind not in FAMILIES:
            raise UserError(
                f"this analysis reads weights, and which of them write into the stream is not known for model type "
                f"{kind!r}; project_residuals, linear_probes and patch_activations read activations only"
            )
        skeleton = build_skeleton(config)
        return classify(config, {name: tuple(p.shape) for name, p in skeleton.named_parameters()}, skeleton=skeleton)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """Every parameter by its name in the HF checkpoint."""
        return named_weights(self.model)

    def writers(self, component: Component, layer: int, *, is_bias: bool = False) -> list[Writer]:
        """The weights, or biases, that write for a component of a block."""
        wanted = component, layer, is_bias
        return [writer for writer in self.layout.writers if (writer.component, writer.layer, writer.is_bias) == wanted]

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
        tensors = [self.named[writer.name] for writer in self.writers(component, layer, is_bias=True)]
        return tensors[0].detach().cpu().double() if tensors and tensors[0].ndim == 1 else None

    def head_rows(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of every head of a block, before a post-norm."""
        if missing_points(self.model, [block_hook(layer, "attn.hook_z")]):
            raise UserError(f"block {layer} of this model has no attention heads, which this analysis is about")
        (writer,) = self.writers("attn", layer)
        heads = "(head feature) d_model -> head feature d_model"
        return rearrange(self.written_rows(writer), heads, head=self.model.cfg.n_heads)

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


@dataclass(frozen=True, eq=False, repr=False)
class NormMap(Value):
    """The linear part of a norm: x → gain ⊙ (x − mean x), or without the mean, its division by a length apart."""

    gain: Float[Tensor, " d_model"]
    is_centered: bool

    @classmethod
    def of(cls, norm: Norm, model: HookedModel) -> "NormMap":
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
