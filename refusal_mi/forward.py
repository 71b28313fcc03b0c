"""Running a loaded model: logits, cached streams, and passes that go on from an earlier one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .models import HookedModel, model_device, resid_hook
from .tokens import TokenBatch


def last_logits(model: HookedModel, batch: TokenBatch) -> Float[Tensor, "batch d_vocab"]:
    """Next-token logits after the last position, computing no others."""
    logits = model(batch.tokens, logits_to_keep=1, **_inputs(batch))
    return logits[:, -1]


def all_logits(model: HookedModel, batch: TokenBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position."""
    return model(batch.tokens, **_inputs(batch))


class _AllRead(Exception):
    """Ends a pass of which only streams are wanted."""


def read_streams(
    model: HookedModel, batch: TokenBatch, layers: Sequence[int], read: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`read` of the stream entering each of `layers`, `[batch, pos, d_model]`; nothing above the last of them runs."""
    found: dict[int, Tensor] = {}

    def record(layer: int, activation: Tensor, hook: Any) -> Tensor:
        found[layer] = read(activation)
        if layer == max(layers):
            raise _AllRead
        return activation

    hooks: list[Any] = [(resid_hook(layer, model.cfg.n_layers), partial(record, layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks), suppress(_AllRead):
        last_logits(model, batch)
    return [found[layer] for layer in layers]


def cached_residuals(
    model: HookedModel, batch: TokenBatch, layers: Sequence[int], n_last: int
) -> Float[Tensor, "batch pos layer d_model"]:
    """The stream entering each of `layers`, at the last `n_last` positions, through `run_with_cache`."""
    names = [resid_hook(layer, model.cfg.n_layers) for layer in layers]
    _, cache = model.run_with_cache(
        batch.tokens,
        names_filter=names,
        pos_slice=(-n_last, None),
        return_cache_object=False,
        logits_to_keep=1,
        **_inputs(batch),
    )
    return torch.stack([cache[name] for name in names], dim=2)


def prefix_logits_and_cache(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    past: Any = None,
    mask: Int[Tensor, "batch total"] | None = None,
) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
    """Next-token logits after the last column, and HF's KV cache of everything so far.

    Args:
        past: cache of the columns before `tokens`; extended in place.
        mask: over the cached columns and `tokens`; None means that all are real.
    """
    n_past = 0 if past is None else past.get_seq_length()
    if mask is None:
        mask = tokens.new_ones(len(tokens), n_past + tokens.shape[1])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, n_past:]
    logits, cache = model(
        tokens,
        return_type="logits_and_cache",
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    )
    return logits[:, -1], cache


def layers_of_cache(cache: Any, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of an HF cache from `first` on, `[batch, head, pos, d_head]`."""
    return [(layer.keys, layer.values) for layer in cache.layers[first:]]


def cache_from_layers(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """An HF cache that holds these keys and values; extending it copies them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


@contextmanager
def skipping_blocks(model: HookedModel, n: int) -> Iterator[None]:
    """Let blocks 0..n-1 pass their input on: for runs in which a hook puts in the stream that enters block n."""
    blocks = [block.original_component for block in model.blocks[:n]]  # type: ignore[attr-defined]
    before = [block.__dict__.get("forward") for block in blocks]
    n_outputs = _n_block_outputs(model)

    def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if n_outputs == 0 else (hidden_states, *[None] * (n_outputs - 1))

    try:
        for block in blocks:
            block.forward = pass_on
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def last_mlp_at_last_position(model: HookedModel) -> Iterator[None]:
    """Let the last block's MLP compute the last position alone, the only one that last-position logits read.

    Elsewhere it gives zeros. Blocks without an MLP module that maps a stream to a stream are left as they are.
    """
    block = model.blocks[-1]  # type: ignore[attr-defined]
    mlp = getattr(getattr(block, "mlp", None), "original_component", None)
    if mlp is None:
        yield
        return
    before, forward = mlp.__dict__.get("forward"), mlp.forward

    def last(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = forward(hidden_states[:, -1:], *args, **kwargs)
        if not isinstance(found, Tensor):
            return forward(hidden_states, *args, **kwargs)
        return torch.nn.functional.pad(found, (0, 0, hidden_states.shape[1] - 1, 0))

    try:
        mlp.forward = last
        yield
    finally:
        del mlp.forward
        if before is not None:
            mlp.forward = before


def _n_block_outputs(model: HookedModel) -> int:
    """How many values this architecture's blocks return in a tuple; 0 where they return the stream alone."""
    found = []
    block = model.blocks[0].original_component  # type: ignore[attr-defined]
    handle = block.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        last_logits(model, TokenBatch(*torch.ones(2, 1, 1, dtype=torch.long, device=model_device(model))))
    finally:
        handle.remove()
    return len(found[0]) if isinstance(found[0], tuple) else 0


def read_out(model: HookedModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of residual streams: the final norm, the unembedding, and what the model does to its logits."""
    normed = model.ln_final(residuals)  # type: ignore[attr-defined]
    return model.adapter.apply_output_logits_transform(model.unembed(normed))  # type: ignore[attr-defined]


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {"attention_mask": batch.mask, "position_ids": batch.position_ids, "use_cache": False}
