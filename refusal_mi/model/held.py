"""Models that are loaded already: wrapped in place, known by what they hold."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, cause
from ..values import Value
from .guards import guarded, no_processor
from .hooked import (
    OF_THE_HF_MODEL,
    Identity,
    check_is_same,
    check_unprocessed,
    identify,
    is_hooked_transformer,
    translated,
)

NO_TOKENIZER = "nothing says where this model's tokenizer is: pass load_model(model, tokenizer=...)"
_WRAPPED = "_refusal_mi_bridge"


def adopt(held: Any, tokenizer: Any = None, hf_model: Any = None) -> Any:
    """A bridge or a `HookedTransformer`, or an HF model as the one bridge that is made of it.

    Args:
        tokenizer: by default a TransformerLens model's own, or the one in the directory that an HF model's config
            names; of a hub id the one in the hub's cache.
        hf_model: what a `HookedTransformer` was made of, an HF model, a directory or a hub id in the hub's cache; by
            default the one that its tokenizer comes from. Weights are read by analyses from an HF model alone.

    Raises:
        UserError: it is none of these, some parts of it cannot be hooked, it was processed, or there is no tokenizer
            that fits.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer= takes an HF tokenizer, not a {type(tokenizer).__name__}")
    if hf_model is not None and not is_hooked_transformer(held):
        raise UserError("hf_model= is what a HookedTransformer was made of; any other model says so itself")
    if is_hooked_transformer(held):
        _identify(held, tokenizer, hf_model)
        tokenizer = held.tokenizer if tokenizer is None else tokenizer
    elif isinstance(held, TransformerBridge):
        tokenizer = held.tokenizer if tokenizer is None else as_it_is(tokenizer)
    elif isinstance(held, PreTrainedModel):
        _check_hf_model(held)
        tokenizer = _tokenizer_of(held) if tokenizer is None else as_it_is(tokenizer)
    else:
        raise UserError(_what_it_is(held))
    if tokenizer is None:
        raise UserError(NO_TOKENIZER)
    n_rows = _hf_part(held).get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > n_rows:  # added ones, such as a pad token, need no row unless a prompt has them
        raise UserError(
            f"this tokenizer has {tokenizer.vocab_size} ids and the model's embedding {n_rows}: is it another model's?"
        )
    model = held.__dict__.get(_WRAPPED) if isinstance(held, PreTrainedModel) else held
    if model is None:
        with no_processor():
            model = TransformerBridge.boot_transformers(
                name_of(held), hf_model=held, tokenizer=tokenizer, dtype=held.dtype
            )
        held.__dict__[_WRAPPED] = model  # a second bridge would take its submodules from the first
    elif tokenizer is not model.tokenizer:
        model.tokenizer = tokenizer
    return model


def as_it_is(tokenizer: Any) -> Any:
    """A copy that TransformerLens takes without loading it anew from where it came from, template and all."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)
    tokenizer.init_kwargs["add_bos_token"] = True  # read there; what is put before a text stays as it was
    return tokenizer


def name_of(held: Any) -> str:
    """What the config calls it, else its class."""
    config = getattr(_hf_part(held), "config", None)
    return str(getattr(config, "_name_or_path", "") or type(held).__name__)


def _hf_part(held: Any) -> Any:
    return getattr(translated(held) or held, "original_model", held)


def _identify(model: Any, tokenizer: Any, hf_model: Any) -> None:
    """Find out what a `HookedTransformer` was made of, and refuse one that is not that any more."""
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel

    check_unprocessed(model)
    before = translated(model)
    if hf_model is None and before is not None:
        return
    if isinstance(hf_model, PreTrainedModel):
        check_is_same(model, hf_model)
        identify(model, Identity(hf_model.config, hf_model.generation_config, hf_model))
        return
    if not isinstance(hf_model, str | Path | None):
        raise UserError(f"hf_model= takes an HF model, a directory or a hub id, not a {type(hf_model).__name__}")
    name = str(hf_model or model.cfg.tokenizer_name or getattr(tokenizer or model.tokenizer, "name_or_path", ""))
    if not name:
        raise UserError(f"nothing says which model this is: {OF_THE_HF_MODEL}")
    try:
        with guarded(name, is_hub_asked=False):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            try:
                generation = GenerationConfig.from_pretrained(name)
            except OSError:  # it has none of its own
                generation = None
    except Exception as error:  # foreign code
        raise UserError(f"cannot read which model this is in {name!r}: {OF_THE_HF_MODEL} ({cause(error)})") from error
    text = config.get_text_config()
    shape = (text.num_hidden_layers, text.hidden_size)
    if shape != (model.cfg.n_layers, model.cfg.d_model):
        raise UserError(
            f"{name} has {shape[0]} layers of width {shape[1]}, this HookedTransformer {model.cfg.n_layers} of "
            f"{model.cfg.d_model}: {OF_THE_HF_MODEL}"
        )
    identify(model, Identity(config, generation))


def _check_hf_model(held: Any) -> None:
    """Refuse what can be no chat model, and what another bridge has wrapped."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    if held.get_output_embeddings() is None:
        raise UserError(f"a {type(held).__name__} predicts no tokens: load it with AutoModelForCausalLM")
    is_offloaded = hasattr(held, "hf_device_map")
    if not is_offloaded and any(parameter.is_meta for parameter in held.parameters()):
        raise UserError(f"this {type(held).__name__} has no weights (device meta): load it with from_pretrained")
    if _WRAPPED not in held.__dict__ and any(isinstance(each, GeneralizedComponent) for each in held.modules()):
        raise UserError("a TransformerBridge has wrapped this HF model: give load_model the bridge")


def _tokenizer_of(held: Any) -> Any:
    """Of the directory that it was loaded from, or of the hub's cache; the hub is not asked."""
    from transformers import AutoTokenizer

    wrapped = held.__dict__.get(_WRAPPED)
    if wrapped is not None:
        return wrapped.tokenizer
    name = held.config._name_or_path
    if not name:
        raise UserError(NO_TOKENIZER)
    try:
        with guarded(name, is_hub_asked=False):
            return as_it_is(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # foreign code
        where = name if Path(name).exists() else f"{name}, which is no directory here, or in the hub's cache"
        raise UserError(
            f"cannot read a tokenizer in {where}: pass load_model(model, tokenizer=...) ({cause(error)})"
        ) from error


def _what_it_is(held: Any) -> str:
    if hasattr(held, "_orig_mod"):
        return "load_model cannot hook a compiled model: give it the model before torch.compile (its _orig_mod)"
    if hasattr(held, "merge_and_unload"):
        return "load_model cannot hook an adapter's wrapper: give it model.merge_and_unload()"
    return (
        f"cannot load a model from a {type(held).__name__}; expected a directory, a .gguf file, a hub id, an HF "
        "model, a TransformerBridge or a HookedTransformer"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Parts(Value):
    """What a held model would save, without what wraps it."""

    name: str
    """What its config calls it: a directory, a hub id, or its class."""
    config: Any
    generation_config: Any
    tokenizer: Any
    tensors: dict[str, Any]
    """Parameters and buffers under the names that transformers gives them."""


def parts_of(held: Any) -> Parts:
    """The parts of an HF model or a bridge, wrapped or not.

    Raises:
        UserError: it is something else, its weights are quantized or not in memory, or nothing says its tokenizer.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    if is_hooked_transformer(held):
        raise UserError("a HookedTransformer is no checkpoint: export the HF model, folder or hub id it was made of")
    if not isinstance(held, TransformerBridge | PreTrainedModel):
        raise UserError(_what_it_is(held))
    hf: Any = _hf_part(held)
    if isinstance(held, PreTrainedModel):
        _check_hf_model(held)
    named = [*hf.named_parameters(remove_duplicate=False), *hf.named_buffers(remove_duplicate=False)]
    tensors = {name.replace("._original_component", ""): tensor.detach() for name, tensor in named}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UserError("some weights of this model are not in memory (a device map): export its folder or hub id")
    if getattr(hf.config, "quantization_config", None) is not None:
        raise UserError("the weights of this model are quantized: export the unquantized checkpoint")
    tokenizer = held.tokenizer if isinstance(held, TransformerBridge) else _tokenizer_of(held)
    name = str(getattr(hf.config, "_name_or_path", "") or type(hf).__name__)
    return Parts(name, hf.config, getattr(hf, "generation_config", None), tokenizer, tensors)
