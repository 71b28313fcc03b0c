"""Float64, which sums and distances are computed in: on the CPU where the device has none, as on MPS."""

import torch
from jaxtyping import Float
from torch import Tensor


def with_float64(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values on a device that has float64."""
    return values.cpu() if values.device.type == "mps" else values


def as_double(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values as float64."""
    return with_float64(values).to(torch.float64)
