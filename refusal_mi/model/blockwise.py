"""Many passes at once, block by block: a model whose weights lie on disk reads each of them once for all.

A block runs in a pass of the whole model in which the blocks below pass their input on, the stream that enters is put
in, and the stream that leaves ends the pass: masks, positions and all else are computed by the model's own code.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..progress import track
from ..text.batches import TokenBatch
from .offload import held, is_offloaded, left_alone
from .points import Hook, HookedModel, bridge, model_device, output_hook, resid_hook, split_hook
from .running import (
    SAME_VALUE,
    alone_on,
    blocks_of,
    cache_at,
    forward_replaced,
    last_logits,
    layers_of_cache,
    new_cache,
    prefix_logits_and_cache,
    run_with_past,
    running,
    running_from,
)
from .wrappers import is_untouched

STATE_BYTES = 2**31
"""How much the streams of all passes that run together may take, in the CPU's memory."""
Keep = Callable[[int, int, Tensor], None]
"""Is given the number of a pass, a layer, and the stream that enters it, `[batch, pos, d_model]`."""


@dataclass(eq=False)
class Pending:
    """A pass that has come to a layer. Each has hooks of its own, at points of blocks."""

    batch: TokenBatch
    hooks: Sequence[Hook] = ()
    layer: int = 0
    stream: Float[Tensor, "batch pos d_model"] | None = None
    """What enters the layer, before its hooks; None at layer 0 is what the embedding gives."""
    common: "Pending | None" = None
    """A pass of the columns before these, which stands earlier among the passes that run together."""
    common_rows: Int[Tensor, " batch"] | None = None
    """Which of its rows each row continues."""
    is_continued: bool = False
    keys: tuple[Tensor, Tensor] | None = None
    """Of a pass that others continue: keys and values of the block that ran last."""


class Blocks:
    """The blocks of a model; each runs in all passes before the next one is read."""

    def __init__(self, model: HookedModel, n_outputs: int, has_keys: bool) -> None:
        """`n_outputs` and `has_keys` are what `n_block_outputs` and `has_key_cache` say of the model."""
        self.model, self.n_outputs, self.has_keys, self.blocks = model, n_outputs, has_keys, blocks_of(model)
        root = bridge(model).original_model
        self.embedding, self.head = (
            _inside(part()) for part in (root.get_input_embeddings, root.get_output_embeddings)
        )

    def fitting(self, width: int) -> int:
        """How many rows of so many tokens may run together."""
        return max(1, STATE_BYTES // (width * self.model.cfg.d_model * self.model.cfg.dtype.itemsize))

    def run(self, passes: Sequence[Pending], top: int, *, keep: Keep | None = None, description: str = "") -> None:
        """Bring passes up to a layer; their stream there stays with them, on the CPU.

        Args:
            keep: is given the stream at every layer on the way, what the embedding gives included.
            description: for the progress; none is shown without one.
        """
        layers = range(min((each.layer for each in passes), default=top), top)
        for layer in track(layers, description) if description else layers:
            parts = [self.blocks[layer]] if layer else [self.embedding, self.blocks[0]]
            inside = (module for part in parts for module in part.modules())
            with alone_on(self.model), torch.no_grad(), held(inside):
                for index, each in enumerate(passes):
                    if each.layer == layer:
                        each.stream = self._through(index, each, keep)
                        each.layer = layer + 1

    def logits(self, streams: Sequence[Float[Tensor, "row d_model"]]) -> Iterator[Float[Tensor, "row d_vocab"]]:
        """Next-token logits of streams that left the last block; the unembedding is read once for all that fit.

        Between two of them nothing is held, neither weights nor other threads.
        """
        n_bytes = self.model.cfg.d_vocab * self.model.cfg.dtype.itemsize
        at_once = max(1, STATE_BYTES // (n_bytes * max(map(len, streams), default=1)))
        for start in range(0, len(streams), at_once):
            yield from self._read_out(streams[start : start + at_once])

    def _read_out(self, streams: Sequence[Tensor]) -> list[Tensor]:
        n_layers, device, found = self.model.cfg.n_layers, model_device(self.model), list[Tensor]()
        with alone_on(self.model), torch.no_grad(), held(self.head.modules()):
            for stream in streams:
                token = torch.zeros(len(stream), 1, dtype=torch.long, device=device)
                with self._from(n_layers, [(output_hook(n_layers), _Enter(stream[:, None]))]):
                    found.append(last_logits(self.model, TokenBatch(token, torch.ones_like(token))))
        return found

    def _through(self, index: int, one: Pending, keep: Keep | None) -> Tensor:
        """What leaves the block that a pass has come to."""
        enter, leave = _Enter(one.stream), _Leave()
        own = [(name, function) for name, function in one.hooks if split_hook(name)[0] == one.layer]
        hooks: list[Hook] = [(resid_hook(one.layer, self.model.cfg.n_layers), enter), *own]
        hooks.append((output_hook(one.layer + 1), leave))
        with running(self.model, hooks) if one.stream is None else self._from(one.layer, hooks):
            self._pass(one)
        if keep is not None:
            if one.stream is None:
                keep(index, 0, enter.seen)
            keep(index, one.layer + 1, leave.seen)
        return leave.seen.cpu()

    def _pass(self, one: Pending) -> None:
        mask, cache = one.batch.mask, new_cache(self.model)
        if one.common is None and not one.is_continued:
            last_logits(self.model, one.batch)
            return
        if one.common is not None and one.common.keys is not None:
            keys, values = (each[one.common_rows] for each in one.common.keys)
            mask, cache = mask.new_ones(len(mask), keys.shape[-2] + mask.shape[1]), cache_at(one.layer, keys, values)
            mask[:, keys.shape[-2] :] = one.batch.mask
        run_with_past(self.model, one.batch.tokens, cache, mask)
        if one.is_continued:
            (one.keys,) = layers_of_cache(cache, one.layer)

    @contextmanager
    def _from(self, layer: int, hooks: Sequence[Hook]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(running_from(self.model, layer, hooks, self.n_outputs))
            for module in (self.embedding, *self.blocks[:layer]):
                stack.enter_context(left_alone(module))
            stack.enter_context(forward_replaced(self.embedding, self._nothing))
            yield

    def _nothing(self, ids: Int[Tensor, "batch pos"], *_: Any, **__: Any) -> Tensor:
        """Of the embedding's shape: its weights are not read where a stream is put in."""
        weight: Any = self.embedding.weight
        return torch.zeros(*ids.shape, weight.shape[-1], dtype=weight.dtype, device=ids.device)


class _Enter:
    """A hook that puts a stream in, or looks at the one that is there."""

    def __init__(self, stream: Tensor | None) -> None:
        self.stream, self.seen = stream, torch.empty(0)

    def __call__(self, x: Tensor, hook: Any) -> Tensor:
        self.seen = x if self.stream is None else self.stream.to(x)
        return self.seen


class _Leave:
    """A hook that ends the pass."""

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def __call__(self, x: Tensor, hook: Any) -> Tensor:
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        self.seen = x
        raise StopAtLayerException(x)


def offloaded_blocks(model: HookedModel) -> Blocks | None:
    """The blocks of a model that has weights elsewhere; None for all others, where passes run as everywhere.

    None also, with a warning, where there are hooks on it, which must see whole passes (the caller's, or those that
    TransformerLens itself leaves on an OPT), and where the stream is not all that goes from block to block: a pass by
    blocks must give the logits of a plain one.
    """
    whole = bridge(model)
    if not is_offloaded(whole.original_model):
        return None
    with alone_on(model):  # what other threads put on it for a pass is not the caller's
        if not is_untouched(whole, but_for_accelerate=True):
            warnings.warn("there are hooks on this model: every pass reads all weights from disk", stacklevel=3)
            return None
        if model not in _TRIED:
            _TRIED[model] = _tried(model)
        found = _TRIED[model]
    return None if found is None else Blocks(model, *found)


_TRIED: "WeakKeyDictionary[Any, tuple[int, bool] | None]" = WeakKeyDictionary()
"""What `Blocks` is made with; None where blocks on their own give something else."""


def _tried(model: HookedModel) -> tuple[int, bool] | None:
    n_layers, outputs = model.cfg.n_layers, list[Any]()
    tokens = torch.arange(1, 9, device=model_device(model))[None] % model.cfg.d_vocab
    one = Pending(TokenBatch(tokens, torch.ones_like(tokens)))
    handle = blocks_of(model)[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        Blocks(model, 0, False).run([one], 1)
    finally:
        handle.remove()
    n_outputs = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
    blocks = Blocks(model, n_outputs, False)
    blocks.run([one], n_layers)
    assert one.stream is not None
    (found,) = blocks.logits([one.stream[:, -1]])
    with torch.no_grad(), running(model):
        expected, cache = prefix_logits_and_cache(model, tokens)
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if difference <= SAME_VALUE.get(expected.dtype, 0.02) * scale:
        return n_outputs, all(hasattr(layer, "keys") for layer in cache.layers)
    warnings.warn(
        f"blocks on their own change a logit by {difference:.1e} on this model: every pass reads all weights from disk",
        stacklevel=3,
    )
    return None


def _inside(module: Any) -> nn.Module:
    """Without a bridge's wrapper; nothing, where there is none."""
    return nn.Module() if module is None else getattr(module, "original_component", module)
