"""What a model is to the rest of this package: its hook points, its identity, and every way to count its layers."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ..errors import UserError

Component = Literal["embed", "attn", "mlp"]
"""What writes into the residual stream: the token embedding, attention blocks, MLP blocks."""
HookFn = Callable[..., Tensor]
Hook = tuple[str, HookFn]


@runtime_checkable
class HookedModel(Protocol):
    """A TransformerLens model: `TransformerBridge`, or anything with the same hook points and cache."""

    cfg: Any
    tokenizer: Any

    def hooks(self, fwd_hooks: list[Hook]) -> AbstractContextManager[Any]: ...

    def run_with_cache(self, input: Tensor, **kwargs: Any) -> tuple[Tensor, Any]: ...

    def generate(self, input: Tensor, **kwargs: Any) -> Any: ...

    def __call__(self, input: Tensor, **kwargs: Any) -> Tensor: ...


def model_source(model: HookedModel) -> str:
    """The directory or hub id that the weights came from."""
    return str(model.original_model.config._name_or_path)  # type: ignore[attr-defined]


def model_revision(model: HookedModel) -> str | None:
    """The hub commit that the weights came from; None for a local directory."""
    return getattr(model.original_model.config, "_commit_hash", None)  # type: ignore[attr-defined]


def model_type(model: HookedModel) -> str:
    """The HF `model_type`, such as "llama" or "gemma2"."""
    return model.original_model.config.model_type  # type: ignore[attr-defined]


def stop_token_ids(model: HookedModel) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's and the tokenizer's."""
    generation = getattr(model.original_model, "generation_config", None)  # type: ignore[attr-defined]
    found = getattr(generation, "eos_token_id", None)
    ids = set(found if isinstance(found, list) else [] if found is None else [found])
    if model.tokenizer.eos_token_id is not None:
        ids.add(model.tokenizer.eos_token_id)
    return tuple(sorted(ids))


def model_device(model: HookedModel) -> torch.device:
    """Where inputs go."""
    return torch.device(model.cfg.device)


def check_raw_basis(model: HookedModel) -> None:
    """Refuse a model whose weights were folded or centred: its residual stream is in another basis.

    Raises:
        ValueError: the model is in compatibility mode, or is a processed HookedTransformer.
    """
    folded = str(getattr(model.cfg, "normalization_type", "")).endswith("Pre")
    if getattr(model, "compatibility_mode", False) or folded:
        raise ValueError(
            "this model is in compatibility mode (weights folded and centred), which changes the residual basis; "
            "load it with refusal_mi.load_model(...) or TransformerBridge.boot_transformers(...) and raw weights"
        )


def resid_hook(layer: int, n_layers: int) -> str:
    """The hook point of the stream entering block `layer`; `n_layers` is the stream after the last block."""
    if not 0 <= layer <= n_layers:
        raise UserError(f"layer {layer} does not exist: this model has layers 0..{n_layers}")
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


def write_hooks(
    n_layers: int,
    *,
    layers: Iterable[int] | None = None,
    components: Sequence[Component] = get_args(Component),
) -> list[str]:
    """The hook points where `components` of blocks `layers` (all by default) write into the stream."""
    blocks = list(range(n_layers) if layers is None else layers)
    outside = [block for block in blocks if not 0 <= block < n_layers]
    if outside:
        raise UserError(f"no block {outside[0]}: this model has blocks 0..{n_layers - 1}")
    unknown = set(components) - set(get_args(Component))
    if unknown:
        raise UserError(f"unknown component {sorted(unknown)[0]!r}; expected some of {', '.join(get_args(Component))}")
    names = ["blocks.0.hook_resid_pre"] if "embed" in components and 0 in blocks else []
    for block in blocks:
        names += [f"blocks.{block}.hook_{part}_out" for part in ("attn", "mlp") if part in components]
    return names


def our_layer(caa_layer: int, n_layers: int) -> int:
    """The stream entering block L + 1 is the output of block L.

    Raises:
        UserError: the model has no block L.
    """
    if not 0 <= caa_layer < n_layers:
        raise UserError(f"no block {caa_layer}: CAA's layers of this model are 0..{n_layers - 1} (outputs of blocks)")
    return stream_after(caa_layer)


def stream_after(block: int) -> int:
    """Our layer of what a block puts out, of a model of any depth: what tables show beside CAA's number."""
    return block + 1


def caa_layer(our: int) -> int:
    """The block whose output is the stream entering block `our`.

    Raises:
        UserError: it is the embedding, which is no block's output.
    """
    if our == 0:
        raise UserError("this vector was read at the embedding, which is the output of no block")
    return our - 1


def caa_hook(layer: int) -> str:
    """The hook point by CAA's name: the output of a block."""
    return f"blocks.{layer}.hook_resid_post"


def explain_layer(layer: int) -> str:
    """The translation that every command prints."""
    return f"layer {layer} = output of block {layer} = {caa_hook(layer)} = our {stream_after(layer)}"


_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def layer_of_hook(name: str) -> int:
    """The layer (the stream entering block l) that a hook point names.

    Raises:
        UserError: it is no point of the residual stream between blocks.
    """
    match = _HOOK.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name!r} is not a point between blocks: expected blocks.N.hook_resid_pre (the stream entering block N) "
            "or blocks.N.hook_resid_post (the output of block N)"
        )
    return int(match[1]) + (match[2] == "post")
