"""The one forward path: passes of a loaded model under hooks, no further up and at no more positions than are read.

A bridge's wrappers cost Python at every call, about as much as the arithmetic of a small model (docs/scaling.md). Where
nobody looks into a wrapper and it computes nothing of its own, a pass calls the module that it wraps instead. No copy
is made: the modules that run are the model's own, so whatever was changed in them acts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..progress import track
from ..text.batches import TokenBatch, batches_by_length, left_pad
from .points import (
    Hook,
    HookedModel,
    bridge,
    check_raw_basis,
    embedding_rows,
    model_device,
    model_type,
    output_hook,
    resid_hook,
)
from .wrappers import LeftOut, is_untouched, what_to_leave_out

SAME_VALUE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far values may lie apart, relative to the largest, to count as the same; 0.02 in half precision."""


@contextmanager
def running(
    model: HookedModel, hooks: Sequence[Hook] = (), *, keep_wrappers: bool = False, keep_blocks: bool = False
) -> Iterator[None]:
    """The model with hooks on, for passes of this thread alone: other threads that come through here wait.

    Meanwhile wrappers that nobody looks into are left out, where all hooks are this package's own: hooks of the caller
    may start passes of their own, which must find the model whole.

    Args:
        keep_wrappers: run the bridge as it is in any case: what everything else is compared with.
        keep_blocks: keep the wrappers around whole blocks, for passes that read streams with `run_with_cache`.
    """
    path = _path(model)
    with path.lock:
        outer, path.left_out = path.left_out, None
        on = list(hooks) if outer is None else [*outer.hooks, *hooks]
        try:
            if outer is not None:
                outer.put_back()
            path.left_out = None if keep_wrappers else what_to_leave_out(bridge(model), on, keep_blocks=keep_blocks)
            if path.left_out is None:
                with bridge(model).hooks(fwd_hooks=on):
                    yield
            else:
                try:
                    path.left_out.take_out()
                    yield
                finally:
                    path.left_out.put_back()
        finally:
            path.left_out = outer
            if outer is not None:
                outer.take_out()


@contextmanager
def alone_on(model: HookedModel) -> Iterator[None]:
    """Other threads wait until the end, as they do for `running`; may be entered again in it, and it in this."""
    with _path(model).lock:
        yield


@dataclass
class _Path:
    """What this package does with a model at this moment."""

    lock: Any = field(default_factory=RLock)
    left_out: LeftOut | None = None


_PATHS: "WeakKeyDictionary[Any, _Path]" = WeakKeyDictionary()
"""Beside the models, not on them: copies and pickles of a model must not carry its lock."""
_NEW_PATH = Lock()


def _path(model: HookedModel) -> _Path:
    with _NEW_PATH:
        return _PATHS.setdefault(model, _Path())


def check_fits(model: HookedModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        UserError: one has more tokens than the model's context, or a token id that its embedding lacks.
    """
    n_ids = embedding_rows(model)
    for row in rows:
        too_long, unknown = len(row) > model.cfg.n_ctx, max(row, default=0) >= n_ids
        if too_long or unknown:
            n_shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
            text = model.tokenizer.decode(row[n_shared if len(rows) > 1 else 0 :])[:60]
            reason = f"has {len(row)} tokens, more than the model's context of {model.cfg.n_ctx}: shorten it"
            if unknown:
                reason = f"has token id {max(row)}, beyond the model's embedding of {n_ids}: not this model's tokenizer"
            raise UserError(f"this prompt {reason}: {text!r}")


def batches(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    *,
    description: str,
    most_tokens: int | None = None,
    is_shown: bool = True,
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Indices into `rows` and those rows left-padded on the model's device, longest first.

    Args:
        rows: token ids of whole prompts.
        description: what is done, for the progress and the error.
        most_tokens: most tokens in a batch, padding included.
        is_shown: whether progress is.

    Raises:
        UserError: there are no rows.
        ValueError: the model's weights are not in HF coordinates.
    """
    check_raw_basis(model)
    if not rows:
        raise UserError(f"{description} needs at least one prompt or text")
    check_fits(model, rows)
    device, groups = model_device(model), batches_by_length(rows, batch_size, most_tokens=most_tokens)
    for indices in track(groups, description) if is_shown else groups:
        yield indices, left_pad([rows[index] for index in indices], pad_id).to(device)


def last_logits(model: HookedModel, batch: TokenBatch) -> Float[Tensor, "batch d_vocab"]:
    """Next-token logits after the last position, computing no others."""
    return bridge(model)(batch.tokens, logits_to_keep=1, use_cache=False, **_inputs(model, batch))[:, -1]


def tail_logits(model: HookedModel, batch: TokenBatch, n: int) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at the last `n` positions, computing no others."""
    return bridge(model)(batch.tokens, logits_to_keep=n, use_cache=False, **_inputs(model, batch))[:, -n:]


def all_logits(model: HookedModel, batch: TokenBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position."""
    return bridge(model)(batch.tokens, use_cache=False, **_inputs(model, batch))


def residuals(
    model: HookedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    n_last: int,
    *,
    hooks: Sequence[Hook] = (),
    narrow: "LastPositions | None" = None,
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The stream entering each of `layers`, at the last `n_last` positions, through `run_with_cache`.

    `hooks` are on the model meanwhile, and the stream is read after them. Without any, and none of the caller's, the
    block that the last of `layers` enters does not run: its stream is read where the block below leaves it.

    Args:
        narrow: of the block below the last of `layers`, whose output is read at the last positions alone.
    """
    n_layers, top = model.cfg.n_layers, max(layers)
    names = [resid_hook(layer, n_layers) for layer in layers]
    options: dict[str, Any] = {"logits_to_keep": 1}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stops = not hooks and top > 0 and is_untouched(bridge(model))
        stack.enter_context(running(model, hooks, keep_blocks=True))
        if stops and top < n_layers:
            names = [output_hook(top) if layer == top else name for layer, name in zip(layers, names, strict=True)]
            options = {"stop_at_layer": top}
        if stops and narrow is not None:
            stack.enter_context(narrow.narrowed())
        _, cache = bridge(model).run_with_cache(
            batch.tokens,
            names_filter=names,
            pos_slice=(-n_last, None),
            return_cache_object=False,
            use_cache=False,
            **options,
            **_inputs(model, batch),
        )
    return [cache[name] for name in names]


def read_out(model: HookedModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of residual streams: the final norm, the unembedding, and what the model does to its logits."""
    whole = bridge(model)
    return whole.adapter.apply_output_logits_transform(whole.unembed(whole.ln_final(residuals)))


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
    logits, cache = run_with_past(model, tokens, past, mask)
    return logits[:, -1], cache


def run_with_past(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], past: Any, mask: Int[Tensor, "batch total"] | None
) -> Any:
    """Logits and cache as the bridge gives them, or the stream where a hook ends the pass."""
    n_past = 0 if past is None else past.get_seq_length()
    if past is None and model_type(model) == "codegen":
        past = _keys_like_values()
    if mask is None:
        mask = tokens.new_ones(len(tokens), n_past + tokens.shape[1])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, n_past:]
    return bridge(model)(
        tokens,
        return_type="logits_and_cache",
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
        **_no_attentions(model),
    )


def _keys_like_values() -> Any:
    """An empty cache that keeps keys in the dtype of values, as CodeGen itself does; its bridge leaves them float32."""
    from transformers import DynamicCache

    class KeysLikeValues(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)

    return KeysLikeValues()


def keep_rows_(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Drop all other rows of a batch from an HF cache."""
    cache.reorder_cache(rows)  # batch_select_indices knows no recurrent states


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without one of these, generation is greedy.

    Examples:
        >>> one = generate(model, chat, "Hi", sampling=Sampling(1, temperature=0.7), max_new_tokens=3)
        >>> one == generate(model, chat, "Hi", sampling=Sampling(1, temperature=0.7), max_new_tokens=3)
        True
    """

    seed: int
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None


def continued(
    model: HookedModel,
    batch: TokenBatch,
    n_new: int,
    stops: Sequence[int],
    sampling: Sampling | None = None,
    *,
    use_kv_cache: bool = True,
) -> Int[Tensor, "batch new"]:
    """New tokens of every row until all rows have had a stop token; what follows one means nothing."""
    from transformer_lens.utilities.logits_utils import sample_logits

    drawn: dict[str, Any] = {"temperature": 0.0}
    if sampling is not None:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    whole, past, new = batch, None, list[Tensor]()
    for _ in range(n_new):
        if use_kv_cache:
            latest = whole.tokens if past is None else new[-1][:, None]
            logits, past = prefix_logits_and_cache(model, latest, past, whole.mask)
        else:
            logits = last_logits(model, whole)
        new.append(sample_logits(logits, **drawn))
        whole = whole.extended(new[-1])
        if torch.isin(torch.stack(new), torch.tensor(stops, device=logits.device)).any(0).all():
            break
    return torch.stack(new, dim=1)


def has_key_cache(model: HookedModel) -> bool:
    """Whether its cache is keys and values in every layer: what recurrent mixers keep cannot be shared by prompts."""
    token = torch.ones(1, 1, dtype=torch.long, device=model_device(model))
    with torch.no_grad(), running(model):
        _, cache = prefix_logits_and_cache(model, token)
    return all(hasattr(layer, "keys") for layer in cache.layers)


def layers_of_cache(cache: Any, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of an HF cache from `first` on, `[batch, head, pos, d_head]`."""
    return [(layer.keys, layer.values) for layer in cache.layers[first:]]


def new_cache(model: HookedModel) -> Any:
    """An empty HF cache of keys and values."""
    from transformers import DynamicCache

    return _keys_like_values() if model_type(model) == "codegen" else DynamicCache()


def cache_at(layer: int, keys: Tensor, values: Tensor) -> Any:
    """An HF cache for a pass in which block `layer` alone runs: of those below it has the length."""
    filler = keys.new_zeros(1, 1, keys.shape[-2], 1)
    return cache_from_layers([*[(filler, filler)] * layer, (keys, values)])


def cache_from_layers(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """An HF cache that holds these keys and values; extending it copies them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


@contextmanager
def running_from(model: HookedModel, layer: int, hooks: Sequence[Hook], n_outputs: int) -> Iterator[None]:
    """`running` from block `layer` on: the blocks below pass their input on, a hook puts in the stream that enters.

    Args:
        n_outputs: what `n_block_outputs` says of the model.
    """

    def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if n_outputs == 0 else (hidden_states, *[None] * (n_outputs - 1))

    below = blocks_of(model)[:layer]
    with running(model, hooks), ExitStack() as stack:
        for block in below:
            stack.enter_context(forward_replaced(block, pass_on))
        yield


def blocks_of(model: HookedModel) -> list[nn.Module]:
    """The live blocks, whether their wrappers are left out at this moment or not."""
    return [getattr(block, "original_component", block) for block in bridge(model).blocks]


def n_block_outputs(model: HookedModel) -> int:
    """How many values this architecture's blocks return in a tuple; 0 where they return the stream alone."""
    outputs: list[Any] = []
    token = torch.ones(1, 1, dtype=torch.long, device=model_device(model))
    block = blocks_of(model)[0]
    with torch.no_grad(), running(model):
        handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            bridge(model)(token, use_cache=False)
        finally:
            handle.remove()
    return len(outputs[0]) if isinstance(outputs[0], tuple) else 0


class LastPositions:
    """Lets a block compute queries, attention output and MLP at its last positions alone, where nothing else is read.

    In the first pass these modules compute everything, and what they give for the last positions alone is compared
    with it; where that differs (modules that mix positions, or want whole streams), nothing is ever left out.
    """

    def __init__(self, model: HookedModel, block: int, n: int) -> None:
        """`block` counts from the end if negative; `n` positions are read."""
        self.model, inside = model, bridge(model).blocks[block]
        attn = getattr(inside, "attn", None)
        parts = [getattr(inside, "mlp", None), getattr(attn, "q", None), getattr(attn, "o", None)]
        wrapped = [getattr(part, "original_component", None) for part in parts]
        self.modules = [module for module in wrapped if module is not None]
        self.n, self.is_same = n, dict[nn.Module, bool]()

    @property
    def is_used(self) -> bool:
        """Whether positions are left out: all modules were seen to give the same."""
        return len(self.is_same) == len(self.modules) and all(self.is_same.values())

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """For one pass, inside `running`: the block gives nonsense at all other positions.

        Does nothing where the bridge runs as it is: hooks of the caller could see it.
        """
        with ExitStack() as stack:
            for module in self.modules if _path(self.model).left_out is not None else ():
                stack.enter_context(forward_replaced(module, partial(self._forward, module, module.forward)))
            yield

    def _forward(self, module: nn.Module, forward: Any, stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_used and stream.shape[1] > self.n:
            last = forward(stream[:, -self.n :].contiguous(), *args, **kwargs)
            missing = (0, 0, stream.shape[1] - self.n, 0)
            if isinstance(last, tuple):
                return nn.functional.pad(last[0], missing), *last[1:]
            return nn.functional.pad(last, missing)
        whole = forward(stream, *args, **kwargs)
        if module not in self.is_same and stream.shape[1] > self.n:
            try:
                last = forward(stream[:, -self.n :].contiguous(), *args, **kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError):  # modules that do not take a part of a stream
                last = None
            self.is_same[module] = _same(whole, last, self.n)
        return whole


def _same(whole: Any, last: Any, n: int) -> bool:
    """Whether `last` is the last `n` positions of `whole`, `[batch, pos, ...]` or the first of a tuple."""
    if isinstance(whole, tuple) and isinstance(last, tuple):
        whole, last = whole[0], last[0]
    if not isinstance(whole, Tensor) or not isinstance(last, Tensor) or last.shape != whole[:, -n:].shape:
        return False
    difference, scale = (last - whole[:, -n:]).abs().max(), whole.abs().max()
    return bool(difference <= SAME_VALUE.get(whole.dtype, 0.02) * scale)


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before


def _inputs(model: HookedModel, batch: TokenBatch) -> dict[str, Any]:
    return {"attention_mask": batch.mask, "position_ids": batch.position_ids, **_no_attentions(model)}


def _no_attentions(model: HookedModel) -> dict[str, Any]:
    """A bridge asks HF for the attention of all layers at once; without wrappers in attention nobody reads it."""
    return {} if _path(model).left_out is None else {"output_attentions": False}
