"""Directions of the tiny models."""

import torch
from torch import Tensor

from refusal_mi.directions import Direction
from refusal_mi.model.points import resid_hook

from .models import D_MODEL, N_LAYERS


def direction_of(vector: Tensor, layer: int = 2) -> Direction:
    """This vector, as one that was read at the last position of the stream entering a block."""
    return Direction(vector, layer, resid_hook(layer, N_LAYERS), -1)


def random_direction(seed: int = 0, layer: int = 2, *, scale: float = 3.0, width: int = D_MODEL) -> Direction:
    """A normal vector of length about scale · √width."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return direction_of(vector * scale, layer)
