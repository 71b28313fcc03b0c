"""A loaded model run without TransformerLens' wrappers: the same HF modules, weights and hook points, in less time.

Every wrapper costs Python at every call, about as much as the arithmetic of a small model (docs/scaling.md). Where a
pass needs nothing but the logits and hooks on the residual stream and what is written into it, a second skeleton of
the HF model on the same weights gives the same numbers. It is used only for hook points that were seen to carry the
same values on both sides; everything else runs on the bridge.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .blocks import Runner, at_last_positions
from .models import Hook, HookedModel, resid_hook, write_hooks
from .watch import Watch, has_callers_hooks

SAME_VALUE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far values may lie apart, relative to the largest, to count as the same; 0.02 in half precision."""

_KEPT = "_refusal_mi_native"


@contextmanager
def running(model: HookedModel, hooks: Sequence[Hook] = ()) -> Iterator[Runner]:
    """The model with hooks on, as `choose_runner` gives it: `with running(model, hooks) as runner`."""
    runner = choose_runner(model, hooks)
    with runner.hooks(fwd_hooks=list(hooks)):
        yield runner


def choose_runner(model: HookedModel, hooks: Sequence[Hook] = ()) -> Runner:
    """The model without wrappers where that gives the same with these hooks, else the model.

    Hooks of the caller that are on the model already, training mode, several devices, quantized weights, or a hook
    point that shows other values on the plain HF modules lead to the bridge.
    """
    native = native_model(model)
    return model if native is None or not native.has([name for name, _ in hooks]) else native


def native_model(model: HookedModel) -> "NativeModel | None":
    """The model's native form, made anew when the model was changed; None where there is none, or hooks are on it."""
    if not hasattr(model, "original_model"):
        return None
    kept = model.__dict__.get(_KEPT)
    if kept is None or kept[1].has_other_parts():
        model.__dict__.pop(_KEPT, None)
        if has_callers_hooks(model) or any(each.training for each in model.modules()):  # type: ignore[attr-defined]
            return None
        native = _build(model)
        kept = model.__dict__[_KEPT] = (native, Watch(model))
    native, watch = kept
    return None if watch.has_other_hooks() else native


def without_grad(model: HookedModel) -> AbstractContextManager[Any]:
    """Inference mode, or `no_grad` where hooks of the caller could keep what they see and differentiate through it."""
    return torch.no_grad() if native_model(model) is None else torch.inference_mode()


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
        self.narrows = False
        """Whether the last blocks can compute the last positions alone (`blocks.at_last_positions`)."""

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
        return output.logits if return_type == "logits" else (output.logits, getattr(output, "past_key_values", None))

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


def _build(model: Any) -> NativeModel | None:
    """The HF modules again, empty, and the model's own parameters and buffers put in."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    original = model.original_model
    tensors = {_plain(name): tensor for name, tensor in original.named_parameters(remove_duplicate=False)}
    tensors |= {_plain(name): tensor for name, tensor in original.named_buffers(remove_duplicate=False)}
    devices = {tensor.device for tensor in tensors.values()}
    is_known = isinstance(original, PreTrainedModel) and type(original).__module__.startswith("transformers.")
    is_plain = is_known and not getattr(original, "is_quantized", False)
    if not is_plain or len(devices) != 1 or devices == {torch.device("meta")}:
        return None
    config = deepcopy(original.config)
    config.output_attentions = False  # a bridge asks for them: every layer's would be held to the end of a pass
    with init_empty_weights(include_buffers=True):
        hf = type(original)(config).eval()
    if any("dynamic" in str(getattr(module, "rope_type", "")) for module in hf.modules()):
        return None  # its rotary embedding remembers the longest text that it has seen
    for module_name, module in hf.named_modules():
        for kind in (module._parameters, module._buffers):
            for leaf, empty in kind.items():
                if empty is not None:
                    found = tensors.get(f"{module_name}.{leaf}".lstrip("."))
                    if found is None or found.shape != empty.shape:
                        return None
                    kind[leaf] = found
    if any(isinstance(value, Tensor) and value.is_meta for module in hf.modules() for value in vars(module).values()):
        return None  # a tensor that is neither parameter nor buffer, so that the model's own cannot be put in by name
    twins = dict(hf.named_modules())
    modules = {id(module): twins.get(_plain(name)) for name, module in original.named_modules()}
    native = NativeModel(model, hf, {key: module for key, module in modules.items() if module is not None})
    return _checked(model, native)


@torch.no_grad()
def _checked(model: HookedModel, native: NativeModel) -> NativeModel | None:
    """The native form with the hook points that carry the same values as the bridge's; None if its logits differ."""
    tokens = torch.arange(12, device=model.cfg.device).reshape(2, 6) * 7 % model.cfg.d_vocab
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    n_layers, real = model.cfg.n_layers, mask.bool()
    streams = [resid_hook(layer, n_layers) for layer in range(n_layers + 1)]
    names = [name for name in streams + write_hooks(n_layers) if name in native.points]
    expected, found = (_values(runner, names, tokens, mask) for runner in (model, native))
    is_same = {name: _same(value, found.get(name), real) for name, value in expected.items()}
    has_cache = native(tokens[:, :1], return_type="logits_and_cache", use_cache=True)[1] is not None
    if not is_same["logits"] or not has_cache:
        return None
    native.points = {name: point for name, point in native.points.items() if is_same.get(name)}
    last = torch.zeros_like(real)
    last[:, -2:] = True
    native.narrows = all(
        _narrows(runner, block, streams[block + 1], expected, tokens, mask, last)
        for runner in (model, native)
        for block in range(max(0, n_layers - 2), n_layers)
    )
    return native


@torch.no_grad()
def _values(runner: Runner, names: Sequence[str], tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What hook points carry, and the logits."""
    found: dict[str, Tensor] = {}
    reading: list[Hook] = [(name, partial(_keep, found, name)) for name in names]
    with runner.hooks(fwd_hooks=reading):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found["logits"] = runner(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return found


def _narrows(
    runner: Runner, block: int, stream: str, expected: dict[str, Tensor], tokens: Tensor, mask: Tensor, last: Tensor
) -> bool:
    """Whether a block leaves the same stream at the last positions when it computes no others."""
    try:
        with at_last_positions(runner, block, 2):
            found = _values(runner, [stream], tokens, mask)
    except (RuntimeError, IndexError):  # modules that do not take a part of a stream
        return False
    return _same(expected[stream], found.get(stream), last)


def _same(a: Tensor, b: Tensor | None, where: Tensor) -> bool:
    """Whether two activations, `[batch, pos, ...]`, agree at some positions."""
    if b is None or a.shape != b.shape or a.shape[:2] != where.shape:
        return False
    a, b = a[where], b[where]
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
