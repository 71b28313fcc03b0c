"""Running a loaded model: logits, cached streams, and passes that go on from an earlier one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Runner, at_last_positions, skipping_blocks
from .models import Hook, HookedModel, resid_hook
from .native import choose_runner, native_model, running
from .tokens import TokenBatch


def last_logits(model: Runner, batch: TokenBatch) -> Float[Tensor, "batch d_vocab"]:
    """Next-token logits after the last position, computing no others."""
    logits = model(batch.tokens, logits_to_keep=1, **_inputs(batch))
    return logits[:, -1]


def all_logits(model: Runner, batch: TokenBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position."""
    return model(batch.tokens, **_inputs(batch))


class _AllRead(Exception):
    """Ends a pass of which only streams are wanted."""


def read_streams(
    model: HookedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    read: Callable[[Tensor], Tensor],
    hooks: Sequence[Hook] = (),
) -> list[Tensor]:
    """`read` of the stream entering each of `layers`, `[batch, pos, d_model]`; nothing above the last of them runs.

    `hooks` are on the model meanwhile; streams are read after them.
    """
    found: dict[int, Tensor] = {}

    def record(layer: int, activation: Tensor, hook: Any) -> Tensor:
        found[layer] = read(activation)
        if layer == max(layers):
            raise _AllRead
        return activation

    readers: list[Hook] = [(resid_hook(layer, model.cfg.n_layers), partial(record, layer)) for layer in layers]
    with running(model, [*hooks, *readers]) as runner, suppress(_AllRead):
        last_logits(runner, batch)
    return [found[layer] for layer in layers]


def cached_residuals(
    model: HookedModel, batch: TokenBatch, layers: Sequence[int], n_last: int
) -> Float[Tensor, "batch pos layer d_model"]:
    """The stream entering each of `layers`, at the last `n_last` positions, through `run_with_cache`.

    On a model without hooks of the caller, the block that the last of them enters does not run: its stream is read
    where the block below leaves it, and that one computes only the positions that are read.
    """
    n_layers, top = model.cfg.n_layers, max(layers)
    names = [resid_hook(layer, n_layers) for layer in layers]
    options: dict[str, Any] = {"logits_to_keep": 1}
    native = native_model(model)
    with ExitStack() as stack:
        if native is not None and 0 < top < n_layers:
            left = f"blocks.{top - 1}.hook_resid_post"
            names = [left if layer == top else name for layer, name in zip(layers, names, strict=True)]
            options = {"stop_at_layer": top}
            if native.narrows:
                stack.enter_context(at_last_positions(model, top - 1, n_last))
        _, cache = model.run_with_cache(
            batch.tokens,
            names_filter=names,
            pos_slice=(-n_last, None),
            return_cache_object=False,
            **options,
            **_inputs(batch),
        )
    return torch.stack([cache[name] for name in names], dim=2)


def prefix_logits_and_cache(
    model: Runner,
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
def running_from(model: HookedModel, layer: int, hooks: Sequence[Hook]) -> Iterator[Runner]:
    """`running` from block `layer` on: the blocks below pass their input on, a hook puts in the stream that enters."""
    runner = choose_runner(model, hooks)
    with skipping_blocks(runner, layer), runner.hooks(fwd_hooks=list(hooks)):
        yield runner


def read_out(model: HookedModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of residual streams: the final norm, the unembedding, and what the model does to its logits."""
    normed = model.ln_final(residuals)  # type: ignore[attr-defined]
    return model.adapter.apply_output_logits_transform(model.unembed(normed))  # type: ignore[attr-defined]


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {"attention_mask": batch.mask, "position_ids": batch.position_ids, "use_cache": False}
