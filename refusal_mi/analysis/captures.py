"""Activations read at hook points in one forward pass, under interventions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..forward import last_logits
from ..interventions import Intervention, PromptWidth, all_hooks
from ..models import HookedModel
from ..native import running
from ..tokens import TokenBatch


def captured(
    model: HookedModel,
    batch: TokenBatch,
    readers: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    interventions: Sequence[Intervention] = (),
    prompt_width: PromptWidth = None,
) -> dict[str, Tensor]:
    """What each reader takes from the activation at its hook point, after the interventions, in one forward pass.

    Args:
        prompt_width: columns of each row that are prompt, for interventions on prompt or response only.
    """
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            found[name] = readers[name](activation).detach()

        return read

    hooks = [*all_hooks(model, interventions, prompt_width), *((name, hook_for(name)) for name in readers)]
    with torch.no_grad(), running(model, hooks) as runner:
        last_logits(runner, batch)
    return found


def double(tensor: Tensor) -> Tensor:
    """Float64 on the CPU: what is read here is small, and some devices have no float64."""
    return tensor.detach().cpu().double()
