"""The same edit on a model in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..directions import Direction
from ..errors import UserError
from ..interventions import Ablate, Intervention
from ..weights import EditFigures, edit_
from .classify import classify
from .plan import as_steps, plan_edits, without_embedding


def orthogonalize_(
    model: Any, direction: Direction | Sequence[Direction] | Intervention, *, keep_tied: bool = False
) -> dict[str, EditFigures]:
    """Edit the weights of a `transformers` causal language model in place, so that it does what the hooks did.

    A tied unembedding is untied first: it keeps the unedited embedding.

    Args:
        model: a `PreTrainedModel`, not a hooked one.
        direction: ablated everywhere; or an `Ablate` or `Add`.
        keep_tied: leave a tied embedding alone instead of untying it.

    Returns:
        Per edited parameter, how much was removed and what is left.

    Raises:
        UserError: the model is not a `PreTrainedModel`, or the intervention has no weight form in it.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"orthogonalize_ edits a transformers model, not a {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    steps = as_steps(direction if isinstance(direction, Intervention) else Ablate(direction))
    parameters = dict(model.named_parameters())
    layout = classify(model.config, {name: tuple(value.shape) for name, value in parameters.items()}, skeleton=model)
    if layout.is_tied and keep_tied:
        steps = without_embedding(steps)
    edits = plan_edits(layout, steps, lambda name: parameters[name].detach().cpu())
    if layout.is_tied and layout.token_embedding in edits:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    figures = {}
    with torch.no_grad():
        for name, edit in edits.items():
            # Edited on the CPU: not every accelerator computes in float64.
            copy = parameters[name].detach().cpu().clone().contiguous()
            figures[name] = edit_(copy, edit)
            parameters[name].copy_(copy)
    return figures
