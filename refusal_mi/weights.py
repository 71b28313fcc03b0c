"""Interventions as edits of the tensors that write into the residual stream: pure functions of tensors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .values import Value

MIN_RELATIVE_GAIN = 0.1
"""A post-norm gain below this fraction of their root mean square is not divided by: the row would blow up."""
_CHUNK = 2**22
"""Elements that are edited at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Value):
    """W ← W − strength · left (right W) along the axis of W that writes."""

    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_model"]
    strength: float

    def apply(self, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Edit vectors that are written (rows of the axis that writes)."""
        return rows - self.strength * ((rows @ self.right.T) @ self.left.T)


@dataclass(frozen=True, eq=False, repr=False)
class Shift(Value):
    """Add one vector to everything that the tensor writes."""

    vector: Float[Tensor, " d_model"]

    def apply(self, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Edit vectors that are written (rows of the axis that writes)."""
        return rows + self.vector


@dataclass(frozen=True)
class TensorEdit:
    """What is done to one tensor, in order."""

    axis: int
    """The axis of size d_model along which the tensor writes."""
    steps: tuple[Projection | Shift, ...]

    def exact(self, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The edit of rows in the precision of the steps."""
        for step in self.steps:
            rows = step.apply(rows)
        return rows


@dataclass(frozen=True)
class EditFigures:
    """How much of a tensor was changed, and how well."""

    removed: float
    """‖W′ − W‖ / ‖W‖ (Frobenius)."""
    leftover: float | None
    """‖uᵀW′ − its target‖ / max(‖uᵀW‖, ‖W‖ / √d_model) after rounding to the tensor's dtype, u spanning what the
    projection reads; at strength 1 without a shift the target is 0. None without exactly one projection."""


def writer_projection(
    basis: Float[Tensor, "rank d_model"], strength: float = 1.0, gain: Float[Tensor, " d_model"] | None = None
) -> Projection:
    """The edit that removes `strength` of the span of `basis` from what a writer writes.

    Without a norm after the writer, W′ = W − s QᵀQ W. With a post-norm of gain g the stream gets G n(Wx), so
    W′ = W − s G⁻¹Qᵀ(QG)W: with s = 1 nothing is written along Q, and the rest is written as before except for the
    norm's scale. Coordinates whose gain is too small to divide by keep their rows; the others make up for it:
    left = G⁻¹Q̃ᵀ(Q̃Q̃ᵀ)⁻¹ with Q̃ = Q on the kept coordinates, so that (QG) left = 1 still holds.

    Args:
        basis: orthonormal rows.
        gain: of the norm that follows the writer, as it multiplies (1 + w where the model adds one).

    Raises:
        UserError: the span lies in coordinates that the norm switches off.
    """
    rows = basis.double()
    if gain is None:
        return Projection(rows.T, rows, strength)
    gain = gain.double()
    kept = gain.abs() >= MIN_RELATIVE_GAIN * gain.square().mean().sqrt()
    inside = rows * kept
    gram = inside @ inside.T
    if torch.linalg.eigvalsh(gram)[0] < 0.5:
        raise UserError("the direction lies mostly in coordinates that a post-norm gain of nearly zero switches off")
    safe = torch.where(kept, gain, torch.ones_like(gain))
    return Projection((torch.linalg.solve(gram, inside) / safe).T, rows * gain, strength)


def edit_(tensor: Float[Tensor, "..."], edit: TensorEdit) -> EditFigures:
    """Edit a tensor in place, piece by piece in float64 (half precision: float32), and measure what came of it."""
    wide = torch.float32 if tensor.dtype.itemsize == 2 else torch.float64
    edit = _in_dtype(edit, wide)
    projections = [step for step in edit.steps if isinstance(step, Projection)]
    probe = torch.linalg.qr(projections[0].right.T.double()).Q.to(wide) if len(projections) == 1 else None
    d_model = tensor.shape[edit.axis]
    size = change = before = after = 0.0
    for piece in pieces(tensor, edit.axis):
        rows = piece.to(wide)
        piece.copy_(edit.exact(rows))
        rounded = piece.to(wide)
        size += rows.square().sum().item()
        change += (rounded - rows).square().sum().item()
        if probe is not None:
            seen = rows @ probe
            target = _target(edit, probe, seen)
            before += seen.square().sum().item()
            after += (rounded @ probe - target).square().sum().item()
    removed = math.sqrt(change / size) if size else 0.0
    scale = max(before, size / d_model)
    return EditFigures(removed, math.sqrt(after / scale) if probe is not None and scale else None)


def factors(
    matrix: Float[Tensor, "d_model columns"], edit: TensorEdit
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, "rank columns"]]:
    """The edit of a matrix that writes along its first axis, as a low-rank change: W′ = W + left @ right (float64)."""
    matrix = matrix.double()
    lefts = [matrix[:, :0]]
    rights = [matrix[:0]]
    for step in edit.steps:
        if isinstance(step, Shift):
            lefts.append(step.vector[:, None])
            rights.append(torch.ones_like(matrix[:1]))
        else:
            seen = step.right @ matrix + (step.right @ torch.cat(lefts, 1)) @ torch.cat(rights)
            lefts.append(step.left)
            rights.append(-step.strength * seen)
    return torch.cat(lefts, 1), torch.cat(rights)


def _in_dtype(edit: TensorEdit, dtype: torch.dtype) -> TensorEdit:
    steps = (
        Shift(step.vector.to(dtype))
        if isinstance(step, Shift)
        else Projection(step.left.to(dtype), step.right.to(dtype), step.strength)
        for step in edit.steps
    )
    return TensorEdit(edit.axis, tuple(steps))


def _target(
    edit: TensorEdit, probe: Float[Tensor, "d_model rank"], seen: Float[Tensor, "... rank"]
) -> Float[Tensor, "... rank"]:
    """What should be seen through `probe` afterwards, from what was seen before."""
    for step in edit.steps:
        seen = seen + step.vector @ probe if isinstance(step, Shift) else (1 - step.strength) * seen
    return seen


def pieces(tensor: Float[Tensor, "..."], axis: int) -> list[Float[Tensor, "rows d_model"]]:
    """Views of the tensor, each with the axis that writes last, of bounded size."""
    columns = math.prod(tensor.shape[axis + 1 :])
    blocks = tensor.view(-1, tensor.shape[axis], columns)
    step = max(1, _CHUNK // tensor.shape[axis])
    if columns == 1:
        return list(blocks[:, :, 0].split(step))
    return [piece.T for block in blocks for piece in block.split(step, dim=1)]
