"""Residual streams of single prompts at the last positions: what projections, probes and PCA are computed from."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..errors import UserError
from ..forward import cached_residuals
from ..interventions import Intervention, all_hooks
from ..models import HookedModel, check_raw_basis, model_device
from ..progress import track
from ..tokens import batches_by_length, left_pad

MAX_BYTES = 2**31
"""Largest table that is kept in memory."""


def stream_residuals(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    n_last: int | None = None,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 32,
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos layer d_model"]]]:
    """Indices into `instructions` and the stream of those prompts at their last positions, a batch at a time.

    Args:
        layers: 0..n_layers by default; n_layers is the stream after the last block.
        n_last: how many positions from the end; the post-instruction positions by default. One more begins with
            the last token of the instruction.

    Raises:
        UserError: there are no prompts.
    """
    check_raw_basis(model)
    if not instructions:
        raise UserError("an analysis of residual streams needs at least one prompt in every group")
    wanted = range(model.cfg.n_layers + 1) if layers is None else layers
    width = len(chat.positions) if n_last is None else n_last
    rows = [chat.encode(instruction) for instruction in instructions]
    for indices in track(batches_by_length(rows, batch_size), "reading residual streams"):
        batch = left_pad([rows[index] for index in indices], chat.pad_id).to(model_device(model))
        with torch.no_grad(), model.hooks(fwd_hooks=all_hooks(model, interventions)):
            residuals = cached_residuals(model, batch, wanted, width)
        yield indices, residuals


def template_residuals(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    n_last: int | None = None,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 32,
) -> Float[Tensor, "prompt pos layer d_model"]:
    """The whole of `stream_residuals` in one float32 table on the CPU, in the order of `instructions`.

    Raises:
        UserError: there are no prompts, or the table would take more than 2 GiB.
    """
    n_layers = model.cfg.n_layers + 1 if layers is None else len(layers)
    width = len(chat.positions) if n_last is None else n_last
    shape = (len(instructions), width, n_layers, model.cfg.d_model)
    n_bytes = 4 * torch.Size(shape).numel()
    if n_bytes > MAX_BYTES:
        raise UserError(
            f"residuals of {len(instructions)} prompts at {width} positions and {n_layers} layers take "
            f"{n_bytes / 2**30:.1f} GiB; use fewer prompts or name some layers"
        )
    table = torch.empty(shape, dtype=torch.float32)
    for indices, residuals in stream_residuals(
        model,
        chat,
        instructions,
        layers=layers,
        n_last=n_last,
        interventions=interventions,
        batch_size=batch_size,
    ):
        table[indices] = residuals.float().cpu()
    return table


def as_double(residuals: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """float64, on the CPU where the device has none."""
    return (residuals.cpu() if residuals.device.type == "mps" else residuals).double()
