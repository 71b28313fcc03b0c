"""A `HookedTransformer` (TransformerLens 3) as the calls of a bridge, which is what this folder speaks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..precision import is_centred

OF_THE_HF_MODEL = "pass the HF model that this HookedTransformer was made of: load_model(model, hf_model=...)"


@dataclass(frozen=True)
class Identity:
    """What a `HookedTransformer` does not know of itself."""

    config: Any
    """HF config."""
    generation_config: Any
    hf_model: Any = None
    """The HF model with the same weights, where it was given."""


_IDENTITIES: "WeakKeyDictionary[Any, Identity]" = WeakKeyDictionary()


def is_hooked_transformer(model: Any) -> bool:
    """Whether this is a `HookedTransformer` or of a class made from it."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    return ("transformer_lens", "HookedTransformer") in names


def identify(model: Any, identity: Identity) -> None:
    """Say what a `HookedTransformer` was made from; from now on it can be used everywhere."""
    _IDENTITIES[model] = identity


def translated(model: Any) -> "Translated | None":
    """A `HookedTransformer` that was identified, spoken to as to a bridge; None for anything else."""
    identity = _IDENTITIES.get(model) if isinstance(model, nn.Module) else None
    return None if identity is None else Translated(model, identity)


class Translated:
    """The calls that are made of a bridge, made of a `HookedTransformer`; whatever is the same goes through to it.

    Positions are not passed: it derives them from the mask. Its cache holds keys before rotation, as
    `[batch, pos, head, d_head]`: outside they are kept in an HF cache, as a bridge's are.
    """

    def __init__(self, model: Any, identity: Identity) -> None:
        self._model, self._identity = model, identity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def original_model(self) -> "Translated":
        """Its parameters are those that run."""
        return self

    @property
    def config(self) -> Any:
        return self._identity.config

    @property
    def generation_config(self) -> Any:
        return self._identity.generation_config

    @property
    def adapter(self) -> "Translated":
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, on the same storage."""
        return nn.Embedding.from_pretrained(self._model.W_E.detach())

    def apply_output_logits_transform(self, logits: Tensor) -> Tensor:
        """The soft cap of families that have one."""
        from transformer_lens.utilities.activation_functions import apply_softcap

        return apply_softcap(logits, self.cfg.output_logits_soft_cap)

    def __call__(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_type: str = "logits",
        output_attentions: bool = False,
    ) -> Any:
        """Logits at the last `logits_to_keep` positions (0: all), with the cache where one is asked for."""
        if attention_mask is None:  # it would guess padding from ids
            attention_mask = torch.ones_like(tokens)
        past = self._cache(past_key_values, attention_mask, tokens) if use_cache else None
        residual = self._model(
            tokens,
            attention_mask=attention_mask[:, -tokens.shape[1] :],
            past_kv_cache=past,
            stop_at_layer=self.cfg.n_layers,
        )
        final = self._model.ln_final(residual[:, -logits_to_keep:])
        logits = self.apply_output_logits_transform(self._model.unembed(final))
        return (logits, _as_hf(past, past_key_values)) if return_type == "logits_and_cache" else logits

    def run_with_cache(
        self,
        tokens: Tensor,
        *,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = False,
        output_attentions: bool = False,
        stop_at_layer: int | None = None,
        **how: Any,
    ) -> Any:
        """As TransformerLens', which gives the stream in place of logits: nobody reads them here."""
        stop = self.cfg.n_layers if stop_at_layer is None else stop_at_layer
        return self._model.run_with_cache(tokens, stop_at_layer=stop, **how)

    def hooks(self, **how: Any) -> AbstractContextManager[Any]:
        return self._model.hooks(**how)

    def _cache(self, past: Any, mask: Tensor, tokens: Tensor) -> Any:
        """An HF cache as TransformerLens' own; `mask` is over the cached columns and the new ones."""
        from transformer_lens import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.cfg, tokens.device, len(tokens))
        cache.previous_attention_mask = mask[:, : mask.shape[1] - tokens.shape[1]]
        for entry, layer in zip(cache.entries, [] if past is None else past.layers, strict=False):
            if layer.is_initialized:
                entry.past_keys, entry.past_values = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        return cache


def _as_hf(cache: Any, past: Any) -> Any:
    """Keys and values in the HF cache that they continue, or in a new one; layers that did not run have none."""
    from transformers import DynamicCache

    extended = DynamicCache() if past is None else past
    for index, entry in enumerate(cache.entries):
        keys, values = entry.past_keys.transpose(1, 2), entry.past_values.transpose(1, 2)
        if past is not None and index < len(past.layers) and past.layers[index].is_initialized:
            past.layers[index].keys, past.layers[index].values = keys, values
        else:
            extended.update(keys, values, index)
    return extended


def hf_weights(model: Any) -> dict[str, Tensor]:
    """Every parameter by its name in the HF checkpoint, of the HF model that was given with a `HookedTransformer`.

    Raises:
        UserError: none was, or the weights of the two are not the same any more.
    """
    identity = _IDENTITIES[model]
    if identity.hf_model is None:
        raise UserError(f"this analysis reads weights by their HF names: {OF_THE_HF_MODEL}")
    check_is_same(model, identity.hf_model)
    named = identity.hf_model.named_parameters(remove_duplicate=False)
    return {name.replace("._original_component", ""): parameter for name, parameter in named}


def check_is_same(model: Any, hf_model: Any) -> None:
    """Refuse an HF model that gives other logits than the `HookedTransformer` that it is said to have become.

    Raises:
        UserError: it does, on a few tokens.
    """
    ids = torch.linspace(0, model.cfg.d_vocab - 1, 12).long()[None]
    with torch.no_grad():
        theirs = hf_model(ids.to(hf_model.device)).logits.double().cpu()
        ours = translated(model) or Translated(model, Identity(hf_model.config, None))
        own = ours(ids.to(model.cfg.device)).double().cpu()
    allowed = 1e-3 if model.cfg.dtype in (torch.float32, torch.float64) else 0.1
    if theirs.shape != own.shape or not bool((theirs - own).abs().max() <= allowed * theirs.abs().max()):
        raise UserError(
            "hf_model gives other logits than this HookedTransformer: it was made of another model, processed "
            "(use from_pretrained_no_processing), or one of the two was edited since"
        )


def check_unprocessed(model: Any) -> None:
    """Refuse a `HookedTransformer` whose weights are not those of the checkpoint, by what they are.

    Raises:
        UserError: norms are folded, or writers or the unembedding are centred.
    """
    what = None
    if str(model.cfg.normalization_type).endswith("Pre"):
        what = "its norms are folded"
    elif is_centred(model.W_E, model.cfg.dtype):
        what = "its writing weights are centred"
    elif is_centred(model.W_U[:64], model.cfg.dtype):
        what = "its unembedding is centred"
    if what is not None:
        raise UserError(
            f"this HookedTransformer was processed ({what}), so that directions in it are not the checkpoint's: load "
            "it with from_pretrained_no_processing"
        )


def linear_maps(block: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """What reads the normed stream in a block: q, k, v and what the MLP has of gate and in."""
    maps: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in "qkv":
        weight = getattr(block.attn, f"_W_{name.upper()}" if _is_grouped(block, name) else f"W_{name.upper()}")
        maps[name] = partial(torch.matmul, other=weight.transpose(0, 1).flatten(1))
    for name in ("gate", "in"):
        weight = getattr(block.mlp, f"W_{name}", None)
        if weight is not None:
            maps[name] = partial(torch.matmul, other=weight)
    return maps


def _is_grouped(block: Any, name: str) -> bool:
    return name in "kv" and hasattr(block.attn, "_W_K")


def has_norm_after(model: Any, block: int) -> bool:
    """Whether a norm stands between a block's MLP and the stream."""
    return hasattr(model.blocks[block], "ln2_post") or norm_of(model.blocks[block], "mlp") is None


def norm_of(block: Any, component: str) -> Any:
    """The norm before attention or the MLP of a block; None where it stands after them."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    is_after = block.cfg.original_architecture in POST_NORM_ARCHITECTURES
    return None if is_after else block.ln1 if component == "attn" else block.ln2
