"""A loaded model run without TransformerLens' wrappers: the same HF modules, weights and hook points, in less time.

Every wrapper costs Python at every call, about as much as the arithmetic of a small model (docs/scaling.md). Where a
pass needs nothing but the logits and hooks on the residual stream and what is written into it, a second skeleton of
the HF model on the same weights gives the same numbers. It is used only for hook points that were seen to carry the
same values on both sides; everything else runs on the bridge.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .models import Hook, HookedModel, resid_hook, write_hooks

SAME_VALUE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far values may lie apart, relative to the largest, to count as the same; 0.02 in half precision."""

_KEPT = "_refusal_mi_native"


@runtime_checkable
class Runner(Protocol):
    """What a forward pass needs of a model: a bridge, or its `NativeModel`."""

    cfg: Any

    def hooks(self, fwd_hooks: list[Hook]) -> Any: ...

    def __call__(self, input: Tensor, **kwargs: Any) -> Any: ...


@contextmanager
def running(model: HookedModel, hooks: Sequence[Hook] = ()) -> Iterator[Runner]:
    """The model with hooks on, as `choose_runner` gives it: `with running(model, hooks) as runner`."""
    runner = choose_runner(model, hooks)
    with runner.hooks(fwd_hooks=list(hooks)):
        yield runner


def choose_runner(model: HookedModel, hooks: Sequence[Hook] = ()) -> Runner:
    """The model without wrappers where that gives the same with these hooks, else the model.

    Hooks of the caller that are on the model already, training mode, several devices, or a hook point that the plain
    HF modules do not have lead to the bridge.
    """
    native = _native(model)
    return model if native is None or not native.has([name for name, _ in hooks]) else native


@dataclass(frozen=True)
class _Part:
    """A plain HF module, under the name that a bridge has for what it wraps."""

    original_component: nn.Module | None


@dataclass(frozen=True)
class _Attention:
    q: _Part
    o: _Part


@dataclass(frozen=True)
class _Block(_Part):
    mlp: _Part
    attn: _Attention


class NativeModel:
    """An HF model on a bridge's weights, with the bridge's hook points on the stream and what is written into it."""

    def __init__(self, bridge: Any, hf: nn.Module, modules: dict[int, nn.Module]) -> None:
        self.cfg, self.hf = bridge.cfg, hf
        self.blocks = [_block(block, modules) for block in bridge.blocks]
        self.points = dict(self._find_points(bridge, modules))

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of these are hook points here."""
        return all(name in self.points for name in names)

    @contextmanager
    def hooks(self, fwd_hooks: list[Hook]) -> Iterator["NativeModel"]:
        """As the bridge's: `hook(activation, hook=hook_point)`, which may return a new activation."""
        with ExitStack() as stack:
            for name, function in fwd_hooks:
                point, module, is_input = self.points[name]
                change = partial(function, hook=point)
                handle = (
                    module.register_forward_pre_hook(partial(_on_input, change), with_kwargs=True)
                    if is_input
                    else module.register_forward_hook(partial(_on_output, change))
                )
                stack.callback(handle.remove)
            yield self

    def __call__(self, input: Int[Tensor, "batch pos"], *, return_type: str = "logits", **kwargs: Any) -> Any:
        """Logits, or logits and HF's KV cache; `kwargs` are those of the HF model."""
        output = self.hf(input, **kwargs)
        return output.logits if return_type == "logits" else (output.logits, output.past_key_values)

    def _find_points(self, bridge: Any, modules: dict[int, nn.Module]) -> Iterator[tuple[str, tuple]]:
        """Name -> the bridge's hook point, the plain module that has it, and whether it is that module's input."""
        for layer, (theirs, ours) in enumerate(zip(bridge.blocks, self.blocks, strict=True)):
            yield f"blocks.{layer}.hook_resid_pre", (theirs.hook_in, ours.original_component, True)
            yield f"blocks.{layer}.hook_resid_post", (theirs.hook_out, ours.original_component, False)
            parts = {id(part.hook_out): part for part in theirs.modules() if hasattr(part, "original_component")}
            for name in ("hook_attn_out", "hook_mlp_out"):
                point = getattr(theirs, name, None)
                wrapped = _wrapped(parts.get(id(point)), modules)
                if wrapped is not None:
                    yield f"blocks.{layer}.{name}", (point, wrapped, False)


def _native(model: HookedModel) -> NativeModel | None:
    """The model's native form while nothing has changed since it was made; None where there is none."""
    if not hasattr(model, "original_model") or model.training:  # type: ignore[attr-defined]
        return None
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        if any(point.fwd_hooks for point in model.hook_dict.values()):  # type: ignore[attr-defined]
            return None
        native = _build(model)
        kept = model.__dict__[_KEPT] = (native, _Watch(list(model.modules())))  # type: ignore[attr-defined]
    native, watch = kept
    return native if watch.is_unchanged() else None


class _Watch:
    """Notices what a user can change in modules: hooks, children, parameters. Quick: asked before every run."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        holders = [each for each in modules if each._modules or each._parameters]
        self.parts = [parts for each in holders for parts in (each._modules, each._parameters)]
        self.first = self._state()
        self.alive = [part for parts in self.parts for part in parts.values()]  # no id is used a second time

    def is_unchanged(self) -> bool:
        return self._state() == self.first

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(len, self.hooks)), [id(part) for parts in self.parts for part in parts.values()]


def _build(model: Any) -> NativeModel | None:
    """The HF modules again, empty, and the model's own parameters and buffers put in."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    original = model.original_model
    tensors = {_plain(name): tensor for name, tensor in original.named_parameters(remove_duplicate=False)}
    tensors |= {_plain(name): tensor for name, tensor in original.named_buffers(remove_duplicate=False)}
    devices = {tensor.device for tensor in tensors.values()}
    is_plain = isinstance(original, PreTrainedModel) and not getattr(original, "is_quantized", False)
    if not is_plain or len(devices) != 1 or devices == {torch.device("meta")}:
        return None
    with init_empty_weights(include_buffers=True):
        hf = type(original)(deepcopy(original.config)).eval()
    for module_name, module in hf.named_modules():
        for kind in (module._parameters, module._buffers):
            for leaf, empty in kind.items():
                if empty is not None:
                    found = tensors.get(f"{module_name}.{leaf}".lstrip("."))
                    if found is None or found.shape != empty.shape:
                        return None
                    kind[leaf] = found
    twins = dict(hf.named_modules())
    modules = {id(module): twins.get(_plain(name)) for name, module in original.named_modules()}
    native = NativeModel(model, hf, {key: module for key, module in modules.items() if module is not None})
    return _checked(model, native)


def _checked(model: HookedModel, native: NativeModel) -> NativeModel | None:
    """The native form with the hook points that carry the same values as the bridge's; None if its logits differ."""
    n_layers, width = model.cfg.n_layers, 6
    tokens = torch.arange(2 * width, device=model.cfg.device).reshape(2, width) * 7 % model.cfg.d_vocab
    mask = torch.ones_like(tokens)
    mask[1, : width // 2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    values: list[dict[str, Tensor]] = []
    names = [resid_hook(layer, n_layers) for layer in range(n_layers + 1)] + write_hooks(n_layers)
    for runner in (model, native):
        found: dict[str, Tensor] = {}
        reading: list[Hook] = [(name, partial(_keep, found, name)) for name in names if name in native.points]
        with torch.no_grad(), runner.hooks(fwd_hooks=reading):
            found["logits"] = runner(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        values.append(found)
    is_same = {name: _same(value[mask.bool()], values[1][name][mask.bool()]) for name, value in values[0].items()}
    native.points = {name: point for name, point in native.points.items() if is_same.get(name)}
    return native if is_same["logits"] else None


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME_VALUE.get(a.dtype, 0.02) * a.abs().max())


def _keep(found: dict[str, Tensor], name: str, activation: Tensor, hook: Any) -> Tensor:
    found[name] = activation
    return activation


def _wrapped(component: Any, modules: dict[int, nn.Module]) -> nn.Module | None:
    return modules.get(id(getattr(component, "original_component", None)))


def _block(block: Any, modules: dict[int, nn.Module]) -> _Block:
    attn = getattr(block, "attn", None)
    mlp, q, o = (
        _Part(_wrapped(getattr(of, name, None), modules)) for of, name in ((block, "mlp"), (attn, "q"), (attn, "o"))
    )
    return _Block(_wrapped(block, modules), mlp, _Attention(q, o))


def _plain(name: str) -> str:
    """A module's or tensor's name without the wrappers."""
    return name.replace("._original_component", "")


def _on_input(change: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    stream = args[0] if args else kwargs["hidden_states"]
    changed = change(stream)
    if changed is None:
        return None
    return ((changed, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": changed})


def _on_output(change: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    is_tuple = isinstance(output, tuple)
    changed = change(output[0] if is_tuple else output)
    if changed is None:
        return None
    return (changed, *output[1:]) if is_tuple else changed
