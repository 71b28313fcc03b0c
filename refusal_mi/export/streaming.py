"""Running a model of any size with one block of it in memory, hooks included."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention
from ..models import Hook, HookFn
from .block_weights import CheckpointWeights
from .checkpoint import Checkpoint
from .classify import build_skeleton
from .families import Family, family_of


def streamed_model(checkpoint: Checkpoint, interventions: Sequence[Intervention], dtype: torch.dtype) -> Any:
    """The HF model of a checkpoint, under interventions, with parameters only while they are needed.

    Every block is read from its shard when the forward pass reaches it and dropped when it has run. The hook
    functions are those of the interventions; they run where the block's own modules hand their write to the stream.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.directory)
    config._attn_implementation = "eager"
    model = build_skeleton(config)
    weights = CheckpointWeights(checkpoint, family_of(config.model_type), dtype)
    blocks = _blocks(model)
    for prefix, module in _units(model, blocks):
        weights.attach(prefix, module)
    _attach_hooks(model, blocks, config, interventions)
    return model


class ModelShape:
    """As much of a hooked model as interventions need to name their hook points: its shape. It cannot run."""

    tokenizer = None

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.cfg = SimpleNamespace(n_layers=n_layers, d_model=d_model)

    def hooks(self, fwd_hooks: list[Hook]) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def run_with_cache(self, input: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def generate(self, input: Tensor, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, input: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError


def _attach_hooks(
    model: Any, blocks: Mapping[str, nn.Module], config: Any, interventions: Sequence[Intervention]
) -> None:
    family, named = family_of(config.model_type), dict(model.named_modules())
    shape = ModelShape(config.num_hidden_layers, config.hidden_size)
    for intervention in interventions:
        for point, change in intervention.hooks(shape):
            _, layer, site = point.split(".")
            prefix = list(blocks)[int(layer)]
            if site == "hook_resid_pre":
                blocks[prefix].register_forward_pre_hook(_on_input(change), with_kwargs=True)
            elif site == "hook_resid_post":
                blocks[prefix].register_forward_hook(_on_output(change))
            else:
                component = site.removeprefix("hook_").removesuffix("_out")
                path = f"{prefix}.{write_site(family, named, prefix, component)}"
                named[path].register_forward_hook(_on_output(change))


def write_site(family: Family, named: Mapping[str, nn.Module], prefix: str, component: str) -> str:
    """The module whose output is the write, up to a scale that the model multiplies it by."""
    if component in family.post_norms:
        return family.post_norms[component]
    if component == "mlp":
        return "mlp"
    inside = [name.removeprefix(f"{prefix}.") for name in named if name.startswith(f"{prefix}.")]
    return next(name for name in inside if family.naming.role(f"{prefix}.{name}.weight") == ("attn", _number(prefix)))


def _on_input(change: HookFn) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0], hook=None), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], hook=None)}

    return hook


def _on_output(change: HookFn) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], hook=None), *output[1:])
        return change(output, hook=None)

    return hook


def _blocks(model: Any) -> dict[str, nn.Module]:
    """Path -> decoder block."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    name, found = next((name, part) for name, part in lists if len(part) == model.config.num_hidden_layers)
    return {f"{name}.{index}": block for index, block in enumerate(found)}


def _units(model: Any, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What is loaded at a time: a block, or a module outside of the blocks that has parameters of its own."""
    yield from blocks.items()
    for name, part in model.named_modules():
        is_inside = any(name == prefix or name.startswith(f"{prefix}.") for prefix in blocks)
        if not is_inside and any(True for _ in part.parameters(recurse=False)):
            yield name, part


def _number(prefix: str) -> int:
    return int(prefix.rsplit(".", 1)[1])
