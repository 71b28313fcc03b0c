"""Cross-entropy of given texts under interventions: what an intervention costs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from .chat import ChatFormat
from .errors import UserError
from .interventions import Intervention, all_hooks
from .model.running import batches, read_out, residuals, running
from .models import Hook, HookedModel, model_device
from .tokens import TokenBatch

MOST_LOGITS = 2**22
"""Logits that are held at once, 16 MB in float32; those of at least 64 positions."""
PASS_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most tokens in a pass: more of them are no faster and hold more memory."""
MAX_TEXT_TOKENS = 256
"""Plain texts are cut to this many tokens, as in the published evaluation."""


@dataclass(frozen=True)
class ScoredText:
    """Token ids and the index of the first one that is predicted; those before it are only context."""

    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class LossResult:
    """Mean cross-entropy over predicted tokens."""

    ce_loss: float
    """Nats per token."""
    perplexity: float
    n_tokens: int

    def describe(self) -> dict[str, float]:
        """The published keys."""
        return asdict(self)


def answers_to_score(chat: ChatFormat, pairs: Sequence[tuple[str, str]]) -> list[ScoredText]:
    """(instruction, answer) pairs of which the answer's tokens are predicted; empty answers are left out."""
    found = []
    for instruction, answer in pairs:
        ids, first = chat.encode_answered(instruction, answer)
        if first < len(ids):
            found.append(ScoredText(tuple(ids), first))
    return found


def texts_to_score(chat: ChatFormat, texts: Sequence[str]) -> list[ScoredText]:
    """Plain texts, without the chat template, of which every token after the first is predicted."""
    rows = [chat.tokenizer(text)["input_ids"][:MAX_TEXT_TOKENS] for text in texts]
    return [ScoredText(tuple(row), 1) for row in rows if len(row) > 1]


def ce_loss(
    model: HookedModel,
    chat: ChatFormat,
    texts: Sequence[ScoredText],
    *,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 8,
    description: str = "CE loss",
) -> LossResult:
    """Cross-entropy (nats per token) of `texts`; every predicted token counts once, summed in float64."""
    total, count = 0.0, 0
    most_tokens = PASS_TOKENS.get(model_device(model).type, PASS_TOKENS["cpu"])
    rows = [text.token_ids for text in texts]
    for indices, batch in batches(
        model, rows, chat.pad_id, batch_size, description=description, most_tokens=most_tokens
    ):
        scored = [len(rows[index]) - texts[index].first for index in indices]
        prompt_width = batch.tokens.shape[1] - torch.tensor(scored)
        total += _summed_loss(model, batch, scored, all_hooks(model, interventions, prompt_width))
        count += sum(scored)
    mean = total / count
    if not math.isfinite(mean):
        raise UserError("the CE loss is not finite in the model's dtype under this intervention; try --dtype float32")
    return LossResult(mean, math.exp(mean), count)


def _summed_loss(model: HookedModel, batch: TokenBatch, scored: Sequence[int], hooks: Sequence[Hook]) -> float:
    """Summed loss of the last `scored` tokens of every row; only the logits that predict them are computed."""
    (stream,) = residuals(model, batch, [model.cfg.n_layers], max(scored) + 1, hooks=hooks)
    before = torch.cat([row[-n - 1 : -1] for row, n in zip(stream, scored, strict=True)])
    targets = torch.cat([row[-n:] for row, n in zip(batch.tokens, scored, strict=True)])
    total = 0.0
    n_rows = max(64, MOST_LOGITS // model.cfg.d_vocab)
    with torch.no_grad(), running(model, hooks):  # somebody's own intervention may act on the norm or the unembedding
        for some, ids in zip(before.split(n_rows), targets.split(n_rows), strict=True):
            logits = read_out(model, some[None])[0]
            losses = functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="none"
            )
            total += math.fsum(losses.tolist())
    return total
