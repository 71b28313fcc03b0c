"""Float64, which sums and distances are computed in: on the CPU where the device has none, as on MPS."""

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def with_float64(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values on a device that has float64."""
    return values.cpu() if values.device.type == "mps" else values


def as_double(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same values as float64."""
    return with_float64(values).to(torch.float64)


def finite(values: AnyTensor, what: str = "the model's logits") -> AnyTensor:
    """The same values, which are all numbers: for what leaves a model.

    Raises:
        UserError: some are NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        dtype = str(values.dtype).removeprefix("torch.")
        raise UserError(
            f"{what} are not finite (NaN or infinity) in {dtype}: the weights are damaged, an intervention is too "
            "strong, or the dtype too narrow; try --dtype float32 (or --batch-size 1: eager attention in float64 "
            "cannot mask padding)"
        )
    return values


def told(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """The same logits, which say something: a stream that overflows inside a norm gives zeros.

    Raises:
        UserError: all of a row are 0.
    """
    if not bool(logits.any(-1).all()):
        raise UserError(
            "the model's logits are all 0: its activations are so large that a norm divides by infinity; the weights "
            "are damaged, or an intervention is too strong"
        )
    return logits


_N_ROWS = 256


def is_centred(rows: Float[Tensor, "row feature"], dtype: torch.dtype) -> bool:
    """Whether the first rows all have mean 0 up to the rounding of numbers that were once of `dtype`."""
    some = rows[:_N_ROWS].detach()
    some = some.to(torch.promote_types(some.dtype, torch.float32))
    some, most = some[some.any(-1)], max(1e-6, torch.finfo(dtype).eps / 2)
    return len(some) > 0 and bool((some.mean(-1).abs() <= most * some.square().mean(-1).sqrt()).all())
