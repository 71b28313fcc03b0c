"""What a loaded model is made of: its weights, norms and the maps that read the stream."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from .models import HookedModel


def named_weights(model: HookedModel) -> dict[str, Tensor]:
    """Every parameter, by its name in the HF checkpoint."""
    named = model.original_model.named_parameters(remove_duplicate=False)  # type: ignore[attr-defined]
    return {name.replace("._original_component", ""): parameter for name, parameter in named}


def norm_before(model: HookedModel, layer: int, component: Literal["attn", "mlp"]) -> Callable[[Tensor], Tensor] | None:
    """The norm through which a component of block `layer` reads the stream; None where it reads it as it is."""
    block = model.blocks[layer]  # type: ignore[attr-defined]
    is_shared = component == "mlp" and not hasattr(block, "ln2") and not hasattr(block, "ln2_post")
    return getattr(block, "ln1" if component == "attn" or is_shared else "ln2", None)


def final_norm(model: HookedModel) -> Callable[[Tensor], Tensor]:
    """The norm before the unembedding."""
    return model.ln_final  # type: ignore[attr-defined]


def readers(model: HookedModel, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The linear maps of block `layer` that read the normed stream: q, k, v and what the MLP has of gate and in."""
    block = model.blocks[layer]  # type: ignore[attr-defined]
    dense = dict(block.mlp.named_children()) if hasattr(block.mlp, "out") else {}
    found = {name: getattr(block.attn, name) for name in ("q", "k", "v")}
    return found | {name: dense[name] for name in ("gate", "in") if name in dense}
