"""Whether somebody has changed a model, or put hooks on it, since it was last looked at."""

from copy import deepcopy
from typing import Any

from torch import nn

OWN_HOOKS = ("transformer_lens.", "transformers.", "accelerate.")
"""Modules of libraries that put torch hooks of their own on a loaded model's modules."""


class Watch:
    """Remembers what a model is made of and which hooks are on it; quick, for it is asked before every run."""

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        holders = [each for each in modules if each._modules or each._parameters or each._buffers]
        self.config = model.original_model.config
        self.first_parameter, self.holders = next(model.parameters()), holders
        self.hook_dicts = [hooks for each in modules for hooks in _hook_dicts(each)]
        self.part_dicts = [d for each in holders for d in (each._modules, each._parameters, each._buffers)]
        self.kept_alive = [part for parts in self.part_dicts for part in parts.values()]  # no id is used twice
        self.hooks, self.parts, self.settings = self._hooks(), self._parts(), deepcopy(self.config.__dict__)

    def has_other_hooks(self) -> bool:
        """Whether hooks, or patched forward methods, came or went; or parts of the model are in training mode."""
        return self._hooks() != self.hooks

    def has_other_parts(self) -> bool:
        """Whether modules, parameters, buffers or settings are others than they were."""
        return self._parts() != self.parts or self.config.__dict__ != self.settings

    def _hooks(self) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, bool]]]:
        patched = [(id(each.__dict__.get("forward")), each.training) for each in self.holders]
        return tuple(map(tuple, self.hook_dicts)), patched

    def _parts(self) -> tuple[list[int], Any, Any]:
        first = self.first_parameter
        return [id(part) for parts in self.part_dicts for part in parts.values()], first.dtype, first.device


def has_callers_hooks(model: Any) -> bool:
    """Whether hooks are on the model that neither TransformerLens nor transformers put there."""
    if any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()):
        return True
    functions = [hook for each in model.modules() for hooks in _hook_dicts(each) for hook in hooks.values()]
    return not all(str(getattr(function, "__module__", "")).startswith(OWN_HOOKS) for function in functions)


def _hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
