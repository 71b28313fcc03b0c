"""What a pass can leave out of a model's blocks: whole blocks, or positions that nothing reads."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .models import Hook


@runtime_checkable
class Runner(Protocol):
    """What a forward pass needs of a model: a bridge, or its `NativeModel`."""

    cfg: Any

    def hooks(self, fwd_hooks: list[Hook]) -> Any: ...

    def __call__(self, input: Tensor, **kwargs: Any) -> Any: ...


@contextmanager
def skipping_blocks(model: Runner, n: int) -> Iterator[None]:
    """Let blocks 0..n-1 pass their input on: for runs in which a hook puts in the stream that enters block n.

    To be entered before such hooks are on: the first time, a run of one token shows what blocks return.
    """
    n_outputs = _n_block_outputs(model) if n else 0

    def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if n_outputs == 0 else (hidden_states, *[None] * (n_outputs - 1))

    with ExitStack() as stack:
        for block in model.blocks[:n]:  # type: ignore[attr-defined]
            stack.enter_context(_forward_replaced(block.original_component, pass_on))
        yield


@contextmanager
def at_last_positions(model: Runner, block: int, n: int) -> Iterator[None]:
    """Let block `block` compute queries, attention output and MLP at the last `n` positions alone.

    For runs in which nothing else of its output is read, of models for which `NativeModel.narrows` says that the rest
    stays the same; elsewhere these modules give zeros.
    """
    found = model.blocks[block]  # type: ignore[attr-defined]
    attn = getattr(found, "attn", None)
    parts = [getattr(found, "mlp", None), getattr(attn, "q", None), getattr(attn, "o", None)]
    with ExitStack() as stack:
        for part in parts:
            module = getattr(part, "original_component", None)
            if module is not None:
                stack.enter_context(_forward_replaced(module, _narrowed(module.forward, n)))
        yield


def _narrowed(forward: Any, n: int) -> Any:
    def narrow(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = forward(hidden_states[:, -n:].contiguous(), *args, **kwargs)
        if not isinstance(found, Tensor):
            return forward(hidden_states, *args, **kwargs)
        return nn.functional.pad(found, (0, 0, hidden_states.shape[1] - found.shape[1], 0))

    return narrow


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


_N_OUTPUTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _n_block_outputs(model: Runner) -> int:
    """How many values this architecture's blocks return in a tuple; 0 where they return the stream alone."""
    block = model.blocks[0].original_component  # type: ignore[attr-defined]
    if block not in _N_OUTPUTS:
        found: list[Any] = []
        handle = block.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            model(torch.ones(1, 1, dtype=torch.long, device=model.cfg.device), use_cache=False)
        finally:
            handle.remove()
        _N_OUTPUTS[block] = len(found[0]) if isinstance(found[0], tuple) else 0
    return _N_OUTPUTS[block]
