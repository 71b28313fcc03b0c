"""Left-padded batches of token ids, and sizes of them that fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import UserError
from ..values import Value


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatch(Value):
    """Left-padded token ids with their mask; the last column is the last token of every row."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions counted from each row's first real token (0 under the padding)."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(self.tokens.to(device), self.mask.to(device))

    def extended(self, new: Int[Tensor, " batch"]) -> "TokenBatch":
        """With one more token in every row."""
        return TokenBatch(
            torch.cat([self.tokens, new[:, None]], -1), torch.nn.functional.pad(self.mask, (0, 1), value=1)
        )


@dataclass(frozen=True)
class Span:
    """The tokens `first` to `end - 1` of a text; those before them are only context, those after are not run."""

    token_ids: tuple[int, ...]
    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end <= len(self.token_ids):
            raise ValueError(f"a span needs 0 <= first < end <= {len(self.token_ids)}, not {self.first}, {self.end}")


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Pad rows of token ids on the left to a rectangle."""
    if not rows or not all(rows):
        raise ValueError("left_pad needs at least one row and no empty row")
    width = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return TokenBatch(tokens, mask)


def batches_by_length(
    rows: Sequence[Sequence[int]], batch_size: int, *, most_tokens: int | None = None
) -> list[list[int]]:
    """Indices of `rows` in batches of similar length, longest first, so that little is spent on padding.

    Args:
        rows: token ids.
        batch_size: most rows in a batch.
        most_tokens: most tokens in a batch, padding included; a longer row has a batch of its own.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches, start = [], 0
    while start < len(order):
        width = max(1, len(rows[order[start]]))
        size = batch_size if most_tokens is None else max(1, min(batch_size, most_tokens // width))
        batches.append(order[start : start + size])
        start += size
    return batches


def batches_by_cost(lengths: Sequence[int], batch_size: int, overhead: float) -> list[list[int]]:
    """Indices in batches that cost least: Σ (width · rows + overhead) tokens, by dynamic programming.

    Args:
        lengths: tokens of every row.
        batch_size: most rows in a batch.
        overhead: what one more batch costs, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first n rows, and where their last batch starts
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - batch_size), end)
        best.append(min((best[start][0] + lengths[order[start]] * (end - start) + overhead, start) for start in starts))
    batches, end = [], len(order)
    while end:
        start = best[end][1]
        batches.append(order[start:end])
        end = start
    return batches[::-1]


START = 64
Result = TypeVar("Result")


def with_smaller_batches(work: Callable[[int], Result], batch_size: int | None = None) -> Result:
    """Return `work(batch_size)`; with None, start at 64 and halve the size whenever memory runs out.

    Raises:
        UserError: memory runs out at the size that was asked for, or at 1.
    """
    size = START if batch_size is None else batch_size
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise UserError(
                    f"out of memory at batch size {size}; use a smaller --batch-size, shorter prompts or another device"
                ) from None
        torch.cuda.empty_cache()
        size //= 2
