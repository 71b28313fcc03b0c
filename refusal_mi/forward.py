"""Running a loaded model: logits, cached streams, and passes that go on from an earlier one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .models import Hook, HookedModel, resid_hook
from .native import Runner, choose_runner, running
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

    The block that the last of them enters does not run: its stream is read where the block below leaves it, which
    computes no position that is not read; unless a hook acts on its way in.
    """
    n_layers, top = model.cfg.n_layers, max(layers)
    names = [resid_hook(layer, n_layers) for layer in layers]
    options: dict[str, Any] = {"logits_to_keep": 1}
    if 0 < top < n_layers and not model.hook_dict[resid_hook(top, n_layers)].fwd_hooks:  # type: ignore[attr-defined]
        names = [
            f"blocks.{top - 1}.hook_resid_post" if layer == top else name
            for layer, name in zip(layers, names, strict=True)
        ]
        options = {"stop_at_layer": top}
    with at_last_positions(model, top - 1, n_last) if "stop_at_layer" in options else nullcontext():
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
    with _skipping_blocks(runner, layer), runner.hooks(fwd_hooks=list(hooks)):
        yield runner


@contextmanager
def _skipping_blocks(model: Runner, n: int) -> Iterator[None]:
    blocks = [block.original_component for block in model.blocks[:n]]  # type: ignore[attr-defined]
    before = [block.__dict__.get("forward") for block in blocks]
    n_outputs = _n_block_outputs(model) if n else 0

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
def at_last_positions(model: Runner, block: int, n: int) -> Iterator[None]:
    """Let block `block` compute queries, attention output and MLP at the last `n` positions alone.

    For runs in which nothing else of its output is read; elsewhere these modules give zeros. What a block does not
    have as a module that maps a stream to a tensor is left as it is.
    """
    found = model.blocks[block]  # type: ignore[attr-defined]
    attn = getattr(found, "attn", None)
    parts = [getattr(found, "mlp", None), getattr(attn, "q", None), getattr(attn, "o", None)]
    with ExitStack() as stack:
        for part in parts:
            module = getattr(part, "original_component", None)
            if module is not None:
                stack.enter_context(_narrowed(module, n))
        yield


@contextmanager
def _narrowed(module: torch.nn.Module, n: int) -> Iterator[None]:
    before, forward = module.__dict__.get("forward"), module.forward

    def narrow(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = forward(hidden_states[:, -n:].contiguous(), *args, **kwargs)
        if not isinstance(found, Tensor):
            return forward(hidden_states, *args, **kwargs)
        return torch.nn.functional.pad(found, (0, 0, hidden_states.shape[1] - found.shape[1], 0))

    try:
        module.forward = narrow
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


_N_OUTPUTS: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def _n_block_outputs(model: Runner) -> int:
    """How many values this architecture's blocks return in a tuple; 0 where they return the stream alone."""
    block = model.blocks[0].original_component  # type: ignore[attr-defined]
    if block in _N_OUTPUTS:
        return _N_OUTPUTS[block]
    found: list[Any] = []
    handle = block.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        last_logits(model, TokenBatch(*torch.ones(2, 1, 1, dtype=torch.long, device=model.cfg.device)))
    finally:
        handle.remove()
    _N_OUTPUTS[block] = len(found[0]) if isinstance(found[0], tuple) else 0
    return _N_OUTPUTS[block]


def read_out(model: HookedModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of residual streams: the final norm, the unembedding, and what the model does to its logits."""
    normed = model.ln_final(residuals)  # type: ignore[attr-defined]
    return model.adapter.apply_output_logits_transform(model.unembed(normed))  # type: ignore[attr-defined]


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {"attention_mask": batch.mask, "position_ids": batch.position_ids, "use_cache": False}
