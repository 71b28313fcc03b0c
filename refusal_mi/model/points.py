"""What a model is to the rest of this package: its hook points, its identity, and every way to count its layers."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..precision import is_centred
from ..values import check_named, named_near
from .hooked import has_norm_after, translated

Component = Literal["embed", "attn", "mlp"]
"""What writes into the residual stream: the token embedding, attention blocks, MLP blocks."""
HookFn = Callable[..., Tensor]
Hook = tuple[str, HookFn]


@runtime_checkable
class ModelConfig(Protocol):
    """The shape of a model, and how it runs."""

    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: str | None


@runtime_checkable
class HookedModel(Protocol):
    """All that is used of a model outside of this folder, whose functions do the rest.

    At run time it is a `TransformerBridge` or, of TransformerLens 3, a `HookedTransformer`, with everything that
    TransformerLens offers.
    """

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Any: ...


def bridge(model: HookedModel) -> Any:
    """The model as a bridge: for this folder, which alone knows that layout.

    Raises:
        UserError: it is a model that `load_model` has not been given.
    """
    if hasattr(model, "original_model") or not isinstance(model, nn.Module):  # a bridge, or a shape without weights
        return model
    as_bridge = translated(model)
    if as_bridge is None:
        raise UserError(f"this {type(model).__name__} cannot be hooked as it is: use what load_model(model) returns")
    return as_bridge


def model_source(model: HookedModel) -> str:
    """The directory or hub id that the weights came from; the HF class of a model that names none."""
    return str(hf_config(model)._name_or_path or type(bridge(model).original_model).__name__)


_FROM_FILES: "WeakSet[Any]" = WeakSet()


def set_from_files(model: HookedModel, *, is_so: bool) -> None:
    """Say whether the weights are those of the files of `model_source`."""
    (_FROM_FILES.add if is_so else _FROM_FILES.discard)(model)


def is_from_files(model: HookedModel) -> bool:
    """Whether it was loaded here by name; a model that was taken as it is may hold anything."""
    return model in _FROM_FILES


def model_revision(model: HookedModel) -> str | None:
    """The hub commit that the weights came from; None for a local directory."""
    return getattr(hf_config(model), "_commit_hash", None)


def model_type(model: HookedModel) -> str:
    """The HF `model_type`, such as "llama" or "gemma2"."""
    return hf_config(model).model_type


def hf_config(model: HookedModel) -> Any:
    """The config that the model was made from."""
    return bridge(model).original_model.config


def stop_token_ids(model: HookedModel) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's and the tokenizer's."""
    generation = getattr(bridge(model).original_model, "generation_config", None)
    return all_stops(getattr(generation, "eos_token_id", None), model.tokenizer)


def all_stops(of_generation: int | list[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """The ids that a generation config names, and the tokenizer's own."""
    ids = [*(of_generation if isinstance(of_generation, list) else [of_generation]), tokenizer.eos_token_id]
    return tuple(sorted({token for token in ids if token is not None}))


def model_device(model: HookedModel) -> torch.device:
    """Where inputs go."""
    return torch.device(str(model.cfg.device))


_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantization_of(model: HookedModel) -> str | None:
    """How the weights are quantized: "bnb-4bit", "bnb-8bit" or the method's name; None for weights that are numbers.

    A config names its method also where transformers has dequantized the weights.
    """
    settings = getattr(hf_config(model), "quantization_config", None)
    matrices = [each for each in bridge(model).original_model.buffers() if each.ndim > 1 and each.dtype != torch.bool]
    if settings is None or all(each.dtype in _NUMBERS for each in (*parameters_of(model), *matrices)):
        return None
    told: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    method = told.get("quant_method", "unknown")
    method = str(getattr(method, "value", method))  # transformers names it by a member of an enumeration
    if method == "bitsandbytes":
        return "bnb-4bit" if told.get("load_in_4bit") else "bnb-8bit"
    return method


def is_split(model: HookedModel) -> bool:
    """Whether accelerate put its parts on several devices."""
    return len(set((getattr(bridge(model).original_model, "hf_device_map", None) or {}).values())) > 1


def ran_remote_code(model: HookedModel) -> bool:
    """Whether its config, tokenizer or weights are of a class that came with the checkpoint."""
    parts = (hf_config(model), model.tokenizer, bridge(model).original_model)
    return any(type(part).__module__.startswith("transformers_modules.") for part in parts)


def embedding_rows(model: HookedModel) -> int:
    """How many token ids the embedding has."""
    return int(bridge(model).original_model.get_input_embeddings().weight.shape[0])


def parameters_of(model: HookedModel) -> list[Tensor]:
    """Every parameter, tied ones once."""
    return list(bridge(model).original_model.parameters())


def missing_points(model: HookedModel, names: Iterable[str]) -> list[str]:
    """Those hook points that the model does not have."""
    there = bridge(model).hook_dict
    return [name for name in names if name not in there]


def check_point(model: HookedModel, name: str) -> None:
    """Refuse a hook point that the model does not have, and say the near one.

    Raises:
        UserError: it has no such point.
    """
    place_of_hook(name)
    there = bridge(model).hook_dict
    if name not in there:
        block, _ = split_hook(name)
        beside = [each for each in there if each.startswith(f"blocks.{block}.")]
        if not beside:
            raise UserError(f"no {name}: this model has blocks 0..{model.cfg.n_layers - 1}")
        raise UserError(f"this model has no hook point {name}; {named_near(name, beside)}")


def name_mixers(model: HookedModel) -> None:
    """Give a block whose mixer is no attention, but another mixer, `hook_attn_out` for what that writes."""
    for block in bridge(model).blocks:
        parts = getattr(block, "_modules", {})
        mixer = next((name for name in _MIXERS if name in parts), None)
        if mixer is not None and "attn" not in parts:
            block.hook_aliases = {**block.hook_aliases, "hook_attn_out": f"{mixer}.hook_out"}


_MIXERS = ("linear_attn", "conv")
"""A recurrence (qwen3_next), a short convolution (lfm2)."""


def check_raw_basis(model: HookedModel) -> None:
    """Refuse a model whose writing weights were centred: its residual stream is not that of the HF weights.

    What is tested is the property, on some rows of the embedding: centred ones have mean 0 up to rounding, others do
    not. Folded norms alone, all that TransformerLens does to models with RMS norms, leave the stream as it is.

    Raises:
        ValueError: they were, as by compatibility mode or `process_weights` of a model with LayerNorm.
    """
    original = getattr(bridge(model), "original_model", None)
    if original is None:  # a shape without weights
        return
    from accelerate.utils import align_module_device

    wrapper = original.get_input_embeddings()
    embedding = getattr(wrapper, "original_component", wrapper)
    with align_module_device(embedding):  # an offloaded one has its weights only here
        centred = is_centred(embedding.weight, model.cfg.dtype)
    if centred:
        raise ValueError(
            "the weights of this model are centred (compatibility mode or process_weights), which changes the residual "
            "basis; load it with refusal_mi.load_model(...) or TransformerBridge.boot_transformers(...) and raw weights"
        )


BlockPoint = Literal[
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "attn.hook_v",
    "attn.hook_pattern",
    "mlp.hook_out",
]
"""Hook points of a block that are used here."""
EMBEDDING = "blocks.0.hook_resid_pre"
"""Where the embeddings write."""
_WRITES: dict[Component, BlockPoint] = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def block_hook(block: int, point: BlockPoint) -> str:
    """The full name of a hook point of a block."""
    return f"blocks.{block}.{point}"


def mlp_output_hook(model: HookedModel, block: int) -> str:
    """The hook point of what an MLP computes, before a norm that comes after it.

    Raises:
        UserError: the model has none, as a `HookedTransformer` with norms after its MLPs.
    """
    before = block_hook(block, "mlp.hook_out")
    if not missing_points(model, [before]):
        return before
    if has_norm_after(model, block):
        raise UserError("TransformerLens 3 shows no MLP output before the norm after it: use version 4 for this model")
    return block_hook(block, "hook_mlp_out")


def split_hook(name: str) -> tuple[int, str]:
    """The block that a hook point lies in, and what it is called there."""
    _, block, point = name.split(".", 2)
    return int(block), point


def write_hook(component: Component, block: int) -> str:
    """The hook point where a component of a block writes into the stream."""
    return EMBEDDING if component == "embed" else block_hook(block, _WRITES[component])


def component_of(point: str) -> Component | None:
    """What writes into the stream at this hook point of a block; None for the stream itself."""
    return next((component for component, name in _WRITES.items() if name == point), None)


def resid_hook(layer: int, n_layers: int) -> str:
    """The hook point of the stream entering block `layer`; `n_layers` is the stream after the last block."""
    if not 0 <= layer <= n_layers:
        raise UserError(f"layer {layer} does not exist: this model has layers 0..{n_layers}")
    return block_hook(layer, "hook_resid_pre") if layer < n_layers else output_hook(layer)


def output_hook(layer: int) -> str:
    """The same stream, from layer 1 on, where the block below leaves it."""
    return caa_hook(caa_layer(layer))


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
    for component in components:
        check_named("component", component, get_args(Component))
    names = [EMBEDDING] if "embed" in components and 0 in blocks else []
    return names + [write_hook(part, block) for block in blocks for part in _WRITES if part in components]


def explain_writes(n_layers: int) -> str:
    """How many `write_hooks` there are of each kind, and their names with the blocks as a range."""
    blocks = f"blocks.{{0..{n_layers - 1}}}"
    names = ", ".join([EMBEDDING, *(f"{blocks}.{point}" for point in _WRITES.values())])
    return f"embedding, {n_layers} attention outputs, {n_layers} MLP outputs ({names})"


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
    return block_hook(layer, "hook_resid_post")


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


_BLOCK_POINT = re.compile(r"blocks\.(\d{1,9})\.(\w+(?:\.\w+)*)")
_OUTPUTS = ("hook_resid_post", "hook_out")
_IN_STREAM = ("hook_resid_pre", "hook_in", "hook_resid_mid", *_OUTPUTS, *_WRITES.values())


def place_of_hook(name: str) -> int:
    """The layer of any hook point of a block: of what the block puts out the next one, of all else its own.

    Raises:
        UserError: it names no point of a block.
    """
    match = _BLOCK_POINT.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name!r} is no hook point of a block: expected one such as blocks.3.hook_resid_pre (the stream entering "
            "block 3), blocks.3.attn.hook_z (its heads) or blocks.3.hook_mlp_out"
        )
    return int(match[1]) + (match[2] in _OUTPUTS)


def is_between_blocks(name: str) -> bool:
    """Whether a hook point is the stream that enters or leaves a block: what a layer is."""
    return name.split(".", 2)[-1] in ("hook_resid_pre", "hook_in", *_OUTPUTS)


def is_in_stream(name: str) -> bool:
    """Whether what passes a hook point is the residual stream, or is added to it as it is."""
    return name.split(".", 2)[-1] in _IN_STREAM
