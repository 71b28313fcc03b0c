"""Mean residual streams, summed in float64 while they stream by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .chat import ChatFormat
from .errors import UserError
from .forward import cached_residuals
from .models import HookedModel, check_raw_basis, model_device
from .native import without_grad
from .progress import track
from .tokens import batches_by_length, left_pad


@dataclass(frozen=True)
class ActivationMeans:
    """Mean residual stream over prompts, per post-instruction position and layer."""

    means: Float[Tensor, "pos layer d_model"]
    """float64, on the CPU; layer `l` is the stream entering block `l`, `l = 0..n_layers-1`."""
    positions: tuple[int, ...]
    n_prompts: int


def mean_activations(
    model: HookedModel, chat: ChatFormat, instructions: Sequence[str], *, batch_size: int = 32
) -> ActivationMeans:
    """Mean over prompts of the stream entering every block, at every post-instruction position.

    Args:
        instructions: user messages, one prompt each.
        batch_size: prompts per forward pass; the result does not depend on it.

    Raises:
        UserError: there are no instructions.
        ValueError: the model's weights are not in HF coordinates.
    """
    check_raw_basis(model)
    if not instructions:
        raise UserError("mean_activations needs at least one instruction")
    rows = [chat.encode(instruction) for instruction in instructions]
    device = model_device(model)
    layers, n_positions = range(model.cfg.n_layers), len(chat.positions)
    total = torch.zeros(n_positions, len(layers), model.cfg.d_model, dtype=torch.float64)
    with without_grad(model):
        for indices in track(batches_by_length(rows, batch_size), "reading residual streams"):
            batch = left_pad([rows[index] for index in indices], chat.pad_id).to(device)
            total += _double_sum(cached_residuals(model, batch, layers, n_positions))
    return ActivationMeans(total / len(rows), chat.positions, len(rows))


def _double_sum(residuals: Float[Tensor, "batch pos layer d_model"]) -> Float[Tensor, "pos layer d_model"]:
    if residuals.device.type == "mps":  # no float64 there
        residuals = residuals.cpu()
    return residuals.sum(dim=0, dtype=torch.float64).cpu()
