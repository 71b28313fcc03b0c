"""Weights that accelerate keeps elsewhere: when they are read, how long they stay, and that they always go again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

from torch import nn


def offloading(module: nn.Module) -> Any:
    """The accelerate hook that reads a module's weights before every call and drops them after it; None without one."""
    hook = vars(module).get("_hf_hook")  # a bridge's wrapper has the attributes of what it wraps, too
    hooks = getattr(hook, "hooks", (hook,))  # several in one
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def is_offloaded(root: nn.Module) -> bool:
    """Whether some of the weights are elsewhere."""
    return any(offloading(module) is not None for module in root.modules())


def end_offloaded(root: nn.Module) -> None:
    """Let every offloaded module drop its weights also where its call ends in an exception.

    accelerate drops them after the call alone: an error in a hook inside a module, or Ctrl-C, would leave them there.
    """
    for module in root.modules():
        forward: Any = module.forward
        if offloading(module) is not None and getattr(forward, "func", None) is not _ended:
            module.forward = update_wrapper(partial(_ended, module, forward), forward)


def _ended(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    except BaseException:
        hook = offloading(module)
        if hook is not None:
            _drop(module, hook)
        raise


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Read the weights of offloaded modules once, and keep them for all calls until the end."""
    with ExitStack() as stack:
        for module in modules:
            hook = offloading(module)
            if hook is not None:
                stack.callback(_drop, module, hook)
                hook.pre_forward(module)
                stack.enter_context(left_alone(module))
        yield


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """Calls of an offloaded module read and drop nothing meanwhile; inputs still go to its device."""
    from accelerate.hooks import AlignDevicesHook

    hook = offloading(module)
    if hook is None:
        yield
        return
    whole: Any = module._hf_hook
    try:
        module._hf_hook = AlignDevicesHook(hook.execution_device, skip_keys=hook.skip_keys)
        yield
    finally:
        module._hf_hook = whole


def _drop(module: nn.Module, hook: Any) -> None:
    if hasattr(hook, "tied_pointers_to_remove"):  # else it has never read any
        hook.post_forward(module, None)
