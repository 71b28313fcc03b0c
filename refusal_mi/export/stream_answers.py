"""Logits and greedy text of a model of any size, with one block of it in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from ..interventions import Intervention
from ..progress import track
from ..tokens import TokenBatch
from .answers import Answers, DtypeText, compared, cut, no_ids
from .checkpoint import Checkpoint
from .streaming import streamed_model


def stream_answers(
    checkpoint: Checkpoint,
    interventions: Sequence[Intervention],
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    stops: Sequence[int],
    *,
    n_new: int = 0,
    guess: Int[Tensor, "batch guessed"] | None = None,
) -> Answers:
    """What a checkpoint makes of a batch under interventions; every pass reads it once from disk.

    Args:
        n_last: compared positions at the end of every row.
        n_new: new greedy tokens: one pass each, over the newest token and a cache of the others.
        guess: greedy text of a model that should say the same; if it does, one pass is enough.
    """
    model, kind = streamed_model(checkpoint, interventions, getattr(torch, dtype)), getattr(torch, dtype)
    n_last = min(n_last, batch.tokens.shape[1])
    with torch.no_grad(), _default_dtype(kind):
        if guess is not None:
            return _from_guess(model, batch, n_last, stops, pad(guess, (0, n_new - guess.shape[1])))
        output = _run(model, batch, use_cache=n_new > 0, logits_to_keep=n_last)
        ids = _token_by_token(model, batch, output, stops, n_new) if n_new else no_ids(batch)
    return Answers(compared(output.logits, batch, n_last), ids)


def _token_by_token(
    model: Any, batch: TokenBatch, output: Any, stops: Sequence[int], n_new: int
) -> Int[Tensor, "batch new"]:
    ids = no_ids(batch)
    for _ in track(range(n_new), "comparing, token by token"):
        ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids.shape[1] == n_new or all(len(row) < ids.shape[1] for row in cut(ids, stops)):
            break
        output = _run(model, _joined(batch, ids), past=output.past_key_values, use_cache=True, logits_to_keep=1)
    return ids


def _from_guess(
    model: Any, batch: TokenBatch, n_last: int, stops: Sequence[int], guess: Int[Tensor, "batch new"]
) -> Answers:
    """Greedy text by fixed-point iteration: each pass settles at least one more token of every row.

    A token that is the model's choice after its own choices is final, so text that stays as it is is the greedy text.
    """
    while True:
        n_new = guess.shape[1]
        logits = _run(model, _joined(batch, guess), logits_to_keep=n_last + n_new).logits
        chosen = logits[:, n_last - 1 : -1].argmax(-1)
        if cut(chosen, stops) == cut(guess, stops):
            return Answers(compared(logits[:, :n_last], batch, n_last), chosen)
        guess = chosen


def _joined(batch: TokenBatch, ids: Int[Tensor, "batch new"]) -> TokenBatch:
    return TokenBatch(torch.cat([batch.tokens, ids], dim=1), torch.cat([batch.mask, torch.ones_like(ids)], dim=1))


def _run(model: Any, batch: TokenBatch, *, past: Any = None, use_cache: bool = False, logits_to_keep: int) -> Any:
    """A forward pass over all columns, or over the last one with a cache of the others."""
    new = slice(0 if past is None else -1, None)
    return model(
        batch.tokens[:, new],
        attention_mask=batch.mask,
        position_ids=batch.position_ids[:, new],
        past_key_values=past,
        use_cache=use_cache,
        logits_to_keep=logits_to_keep,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Masks and position tables are made in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
