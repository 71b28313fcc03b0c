"""Which wrappers of a bridge a pass can leave out, because they only add hook points; out they go, and back again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .points import Hook

ONLY_HOOKS = {
    "EmbeddingBridge",
    "GatedMLPBridge",
    "LinearBridge",
    "MLPBridge",
    "MoEBridge",
    "MoERouterBridge",
    "NormalizationBridge",
    "PositionEmbeddingsAttentionBridge",
    "RMSNormalizationBridge",
}
"""TransformerLens' wrappers that give, bit for bit, what the module inside gives: they add hook points or, for
attention, write the same sums out. All others stay where they are."""
OWN_HOOKS = ("transformer_lens.", "transformers.", "accelerate.")
"""Libraries that put torch hooks of their own on a loaded model's modules."""


@dataclass
class Wrapper:
    """A wrapper inside a block, where it stands, and whether a hook is on what it gives."""

    parent: nn.Module
    name: str
    wrapper: Any
    original: nn.Module
    is_hooked: bool = False


class Rounded:
    """A torch hook that gives rotated queries and keys the dtype of the attention's weights.

    Weights that are held as integers say nothing of it: what was rotated stays as it is then.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, point: nn.Module, args: Any, output: Tensor) -> Tensor:
        weights = (weight.dtype for weight in self.attention.parameters() if weight.is_floating_point())
        return output.to(next(weights, output.dtype))


def round_rotations(model: Any) -> None:
    """Where sines and cosines are float32 whatever the stream is, let the bridge round what it rotated.

    So OLMo does. TransformerLens rotates as llama does, whose sines and cosines have the stream's dtype; else it
    multiplies float32 patterns with values of half precision, which torch refuses.
    """
    rotary = getattr(getattr(getattr(model, "original_model", None), "model", None), "rotary_emb", None)
    rotary = getattr(rotary, "original_component", rotary)
    if rotary is None or not _is_always_float32(rotary):
        return
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        for name in ("hook_rot_q", "hook_rot_k"):
            point = getattr(attention, name, None)
            if isinstance(point, nn.Module) and not _is_rounded(point):
                point.register_forward_hook(Rounded(attention.original_component))


def _is_rounded(point: nn.Module) -> bool:
    return any(isinstance(hook, Rounded) for hook in point._forward_hooks.values())


def _is_always_float32(rotary: Any) -> bool:
    """Asked with one position of a stream in half precision, and a kind of layer where there are several."""
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    if device.type == "meta":
        return False
    stream = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)
    try:
        with torch.no_grad():
            position = torch.zeros(1, 1, dtype=torch.long, device=device)
            cosines, _ = rotary(stream, position, *getattr(rotary, "layer_types", [])[:1])
    except Exception:  # foreign code: another signature
        return False
    return bool(cosines.dtype == torch.float32)


class Fire:
    """A torch hook that sends a module's output, or the first of several, through the hook point of its wrapper."""

    def __init__(self, point: nn.Module) -> None:
        self.point = point

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return (self.point(output[0]), *output[1:]) if isinstance(output, tuple) else self.point(output)


@dataclass
class LeftOut:
    """Wrappers to leave out and hooks to put on instead of those that the wrappers would have fired."""

    wrappers: list[Wrapper]
    hooks: list[Hook]
    points: list[tuple[Any, Callable[..., Any]]]
    """The hooks again, each with its hook point instead of its name."""

    def take_out(self) -> None:
        """Put in every wrapper's place what it wraps."""
        for point, function in self.points:
            point.add_hook(function)
        for each in self.wrappers:
            each.parent._modules[each.name] = each.original
            if each.is_hooked:
                each.original.register_forward_hook(Fire(each.wrapper.hook_out))

    def put_back(self) -> None:
        """Undo `take_out`, however far it came; twice, because an interrupt may come in the middle of the first."""
        try:
            self._put_back()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for each in self.wrappers:
            each.parent._modules[each.name] = each.wrapper
            fires = [key for key, hook in each.original._forward_hooks.items() if isinstance(hook, Fire)]
            for key in fires:
                del each.original._forward_hooks[key]
        for point, _ in self.points:
            point.remove_hooks()
            point._forward_hooks.clear()  # there were none: with hooks of others on, nothing is left out


def what_to_leave_out(model: Any, hooks: Sequence[Hook], *, keep_blocks: bool = False) -> LeftOut | None:
    """What a pass of a bridge under these hooks can leave out; None where the bridge must run as it is.

    Args:
        keep_blocks: leave the wrappers around whole blocks in: their hook points are read, or the pass ends at one.
    """
    has_wrappers = all(hasattr(block, "original_component") for block in model.blocks)
    if not has_wrappers or not all(_is_ours(function) for _, function in hooks) or not is_untouched(model):
        return None
    inside = {block: list(_walk(block.original_component)) for block in model.blocks}
    loose = {block: list(_loose(block, parts)) for block, parts in inside.items()}
    wrappers = [each for parts in loose.values() for each in parts]
    by_point = {id(each.wrapper.hook_out): each for each in wrappers}
    streams = {id(point): block for block in model.blocks for point in (block.hook_in, block.hook_out)}
    points = []
    by_name = model.hook_dict if hooks else {}  # made anew at every call
    for name, function in hooks:
        point = by_name.get(name)
        if id(point) in by_point:
            by_point[id(point)].is_hooked = True
        elif id(point) not in streams:
            return None
        points.append((point, function))
    if not keep_blocks:
        read = {streams[id(point)] for point, _ in points if id(point) in streams}
        for name, block in model.blocks._modules.items():
            is_bare = type(block).__name__ == "BlockBridge" and len(loose[block]) == len(inside[block]) > 0
            if is_bare and block not in read:
                wrappers.append(Wrapper(model.blocks, name, block, block.original_component))
    return LeftOut(wrappers, list(hooks), points)


def is_untouched(model: Any, *, but_for_accelerate: bool = False) -> bool:
    """Whether a bridge is as it was loaded, but for weights and attributes: in no special mode, and without hooks.

    Hooks are those at hook points, torch hooks, and forward methods that were replaced (as accelerate does).

    Args:
        but_for_accelerate: let pass the modules that accelerate dispatched.
    """
    if not hasattr(model, "original_model") or getattr(model, "compatibility_mode", False):
        return False
    modules = {id(each): each for root in (model, model.original_model) for each in root.modules()}.values()
    return not any(each.training or _is_replaced(each, but_for_accelerate) or _has_hooks(each) for each in modules)


def _is_replaced(module: nn.Module, but_for_accelerate: bool) -> bool:
    return "forward" in module.__dict__ and not (but_for_accelerate and "_hf_hook" in module.__dict__)


def _has_hooks(module: nn.Module) -> bool:
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if not any(kinds):
        return False
    hooks = [hook for kind in kinds for hook in kind.values() if not isinstance(hook, Rounded)]
    if not hooks:
        return False
    return hasattr(module, "fwd_hooks") or not all(module_of(hook).startswith(OWN_HOOKS) for hook in hooks)


def _is_ours(function: Any) -> bool:
    """Whether a hook is this package's, which reads and changes its activation and does nothing else."""
    return module_of(function).startswith("refusal_mi.")


def module_of(function: Any) -> str:
    """Where a hook was written."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", ""))


def _loose(block: Any, wrappers: Sequence[Wrapper]) -> Iterator[Wrapper]:
    """Those of the wrappers inside a block that can be left out; whatever is inside one that cannot be stays."""
    kind = type(block)
    if kind.__name__ not in ("BlockBridge", "ParallelBlockBridge") or not _is_of_transformer_lens(kind):
        return
    reached = {id(each.wrapper) for each in wrappers}
    kept: set[int] = set()
    for each in wrappers:  # from the outside in
        if id(each.parent) in kept or not _only_hooks(each.wrapper, reached):
            kept |= {id(module) for module in each.original.modules()}
        else:
            yield each


def _walk(module: nn.Module) -> Iterator[Wrapper]:
    for name, child in module._modules.items():
        original = getattr(child, "_modules", {}).get("_original_component")
        if original is not None:
            yield Wrapper(module, name, child, original)
            yield from _walk(original)
        elif child is not None:
            yield from _walk(child)


def _only_hooks(wrapper: Any, reached: set[int]) -> bool:
    """Whether a wrapper gives what the module in it gives: of a known kind, on that module's own weights."""
    kind, own = type(wrapper), wrapper._modules.values()
    parts = [child for child in own if "_original_component" in getattr(child, "_modules", {})]
    if kind.__name__ not in ONLY_HOOKS or not _is_of_transformer_lens(kind):
        return False
    if wrapper._parameters or wrapper._buffers or not all(id(part) in reached for part in parts):
        return False
    if getattr(wrapper, "_use_processed_weights", False):
        return False
    if "Norm" in kind.__name__:
        return bool(wrapper.use_native_layernorm_autograd)  # else it computes from settings of its own
    if "Attention" in kind.__name__:
        settings, flags = wrapper.config, ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        theirs = getattr(wrapper.original_component, "config", None)
        is_eager = getattr(theirs, "_attn_implementation", None) == "eager"
        return is_eager and not any(getattr(settings, flag, False) for flag in flags)
    return True


def _is_of_transformer_lens(kind: type) -> bool:
    return kind.__module__.startswith("transformer_lens.")
