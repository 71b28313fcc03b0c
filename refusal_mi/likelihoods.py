"""Log-probabilities of given continuations, one by one, under interventions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .interventions import Interventions, all_hooks, as_interventions
from .measures import MOST_LOGITS, PASS_TOKENS, ScoredText
from .model.points import Hook, HookedModel, model_device
from .model.running import batches, read_out, residuals, running
from .precision import as_double, finite, told
from .text.batches import TokenBatch


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation, given what stands before it."""

    nats: float
    """ln p of all of its tokens, summed."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


def log_likelihoods(
    model: HookedModel,
    texts: Sequence[ScoredText],
    pad_id: int,
    *,
    interventions: Interventions = (),
    batch_size: int = 32,
    description: str = "log-likelihoods",
) -> list[Likelihood]:
    """ln p (nats, in float64) of every text's tokens from `first` on, given those before them.

    The last token of a text is never run: it only is predicted. Texts that differ in nothing else share a row of the
    batch. To interventions on prompt or response, what stands before `first` is the prompt.

    Args:
        texts: with at least one token before `first`, and one from there on.

    Raises:
        UserError: a text is longer than the model's context and one token, or the logits are not finite.
        ValueError: a text has no token to predict, or none before it.
    """
    interventions = as_interventions(interventions)
    if any(not 0 < text.first < len(text.token_ids) for text in texts):
        raise ValueError("a log-likelihood needs at least one token to predict, and one before it")
    sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, text in enumerate(texts):
        sharing.setdefault((text.token_ids[:-1], text.first), []).append(index)
    keys, found = list(sharing), dict[int, Likelihood]()
    if not keys:
        return []
    most_tokens = PASS_TOKENS.get(model_device(model).type, PASS_TOKENS["cpu"])
    rows = [ids for ids, _ in keys]
    read = batches(model, rows, pad_id, batch_size, description=description, most_tokens=most_tokens)
    for indices, batch in read:
        lengths = torch.tensor([len(rows[index]) - keys[index][1] for index in indices])
        hooks = all_hooks(model, interventions, batch.tokens.shape[1] - lengths)
        members = [sharing[keys[index]] for index in indices]
        found |= dict(_of_batch(model, batch, texts, members, hooks))
    return [found[index] for index in range(len(texts))]


def _of_batch(
    model: HookedModel,
    batch: TokenBatch,
    texts: Sequence[ScoredText],
    members: Sequence[Sequence[int]],
    hooks: Sequence[Hook],
) -> Iterator[tuple[int, Likelihood]]:
    """Of the texts that each row stands for; only the logits that predict their tokens are computed."""
    order = [index for each in members for index in each]
    lines = [line for line, each in enumerate(members) for _ in each]
    targets = [texts[index].token_ids[texts[index].first :] for index in order]
    (stream,) = residuals(model, batch, [model.cfg.n_layers], max(map(len, targets)), hooks=hooks)
    before = torch.cat([stream[line, -len(ids) :] for line, ids in zip(lines, targets, strict=True)])
    wanted = torch.tensor([token for ids in targets for token in ids], device=before.device)
    with torch.no_grad(), running(model, hooks):  # somebody's own intervention may act on the norm or the unembedding
        read = [_predicted(model, *some) for some in _pieces(model, before, wanted)]
    nats = torch.cat([each for each, _ in read]).tolist()
    greedy = torch.cat([each for _, each in read]).tolist()
    start = 0
    for index, ids in zip(order, targets, strict=True):
        end = start + len(ids)
        yield index, Likelihood(math.fsum(nats[start:end]), all(greedy[start:end]))
        start = end


def _pieces(model: HookedModel, before: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    n_rows = max(64, MOST_LOGITS // model.cfg.d_vocab)
    return zip(before.split(n_rows), wanted.split(n_rows), strict=True)


def _predicted(model: HookedModel, before: Float[Tensor, "n d_model"], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of each wanted token, and whether it is the likeliest."""
    logits = told(finite(read_out(model, before[None])[0]))
    log_p = as_double(logits).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return log_p.cpu(), (logits.argmax(-1) == wanted).cpu()


def windows(ids: Sequence[int], prefix: int, n_ctx: int) -> list[ScoredText]:
    """A text as pieces that fit into a context, each token predicted once: the harness' rolling windows.

    The first is predicted from `prefix`; every later piece has as many tokens before it as fit, at least one.

    Examples:
        >>> [(text.token_ids, text.first) for text in windows([1, 2, 3, 4, 5], 0, n_ctx=3)]
        [((0, 1, 2, 3), 1), ((2, 3, 4, 5), 2)]

    Args:
        n_ctx: tokens of the model's context; the last token of a piece is only predicted.
    """
    if n_ctx < 1:
        raise UserError(f"a context has at least one token, not {n_ctx}")
    found = [ScoredText((prefix, *ids[:n_ctx]), 1)] if ids else []
    for start in range(n_ctx, len(ids), n_ctx):
        end = min(start + n_ctx, len(ids))
        row = tuple(ids[end - n_ctx - 1 : end])
        found.append(ScoredText(row, len(row) - (end - start)))
    return found
