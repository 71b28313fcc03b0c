"""What is compared: logits at the last prompt positions, and greedy continuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tokens import TokenBatch

DtypeText = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Answers:
    """What one model makes of a batch."""

    logits: Float[Tensor, "compared d_vocab"]
    new_ids: Int[Tensor, "batch new"]
    """Greedy continuations; what follows a stop token means nothing. No columns where none were asked for."""


@dataclass(frozen=True)
class Runs:
    """The same tokens through every model that is compared."""

    hooked: Answers
    """The original under the intervention, in float32."""
    plain: Answers
    """The original, in float32."""
    exported: Answers
    """The export's weights, in float32."""
    stored: Answers
    """The export as it is stored."""
    hooked_as_stored: Answers | None
    """The hooked original in the export's dtype; None where that is float32."""


def compared(
    logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch, n_last: int
) -> Float[Tensor, "compared d_vocab"]:
    """The last positions of each row that are not padding."""
    kept = batch.mask[:, -n_last:].bool()
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[:, -n_last:][kept].to(wide).cpu()


def no_ids(batch: TokenBatch) -> Int[Tensor, "batch new"]:
    """No continuations."""
    return batch.tokens[:, :0]


def cut(ids: Int[Tensor, "batch new"], stops: Sequence[int]) -> list[list[int]]:
    """Continuations up to their first stop token."""
    return [list(takewhile(lambda token: token not in stops, row)) for row in ids.tolist()]


def same_tokens(one: Int[Tensor, "batch new"], other: Int[Tensor, "batch other"], stops: Sequence[int]) -> float:
    """Fraction of positions with equal tokens; what one has and the other has not counts as different."""
    pairs = list(zip(cut(one, stops), cut(other, stops), strict=True))
    total = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return equal / total if total else 1.0
