"""How likely a model is to choose the answer that shows a behavior, in A/B questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor

from .chat import ChatFormat
from .interventions import Intervention, all_hooks
from .model.running import all_logits, batches, last_logits, running
from .models import HookedModel
from .pairs import ABPair, LetterSpan, locate_letter
from .precision import as_double
from .tokens import TokenBatch


@dataclass(frozen=True)
class _Row:
    """Token ids of which the last `n_scored` are predicted, or of which the next token is one of `choices`."""

    pair: int
    column: int
    token_ids: tuple[int, ...]
    n_prompt: int
    n_scored: int = 0
    choices: tuple[int, int] | None = None


class ABQuestions:
    """A/B pairs, tokenized once for many forward passes."""

    def __init__(self, chat: ChatFormat, pairs: Sequence[ABPair]) -> None:
        self.pad_id, self.pairs = chat.pad_id, tuple(pairs)
        self.rows = [row for index, pair in enumerate(pairs) for row in _rows(chat, index, pair)]

    @property
    def n_by_letter(self) -> int:
        """Pairs read from the letter token alone; the others from the whole continuation."""
        return sum(row.choices is not None for row in self.rows)

    def log_probabilities(
        self, model: HookedModel, interventions: Sequence[Intervention] = (), *, batch_size: int = 32
    ) -> Float[Tensor, "pair 2"]:
        """ln p of the matching and of the other answer, in float64.

        Read from the letter token after the prompt and the bracket. Where the tokenizer merges letter and bracket, or
        writes the two answers with different beginnings, ln p of the whole answer.
        """
        found = torch.full((len(self.pairs), 2), torch.nan, dtype=torch.float64)
        groups = [row for row in self.rows if row.choices], [row for row in self.rows if not row.choices]
        for group in filter(None, groups):
            ids = [row.token_ids for row in group]
            description = "reading A/B questions"
            for indices, batch in batches(model, ids, self.pad_id, batch_size, description=description, is_shown=False):
                rows = [group[index] for index in indices]
                padding = batch.tokens.shape[1] - torch.tensor([len(row.token_ids) for row in rows])
                widths = padding + torch.tensor([row.n_prompt for row in rows])
                with torch.no_grad(), running(model, all_hooks(model, interventions, widths)):
                    _read(model, batch, rows, found)
        return found


def p_matching(log_probabilities: Float[Tensor, "pair 2"]) -> Float[Tensor, " pair"]:
    """p(matching) / (p(matching) + p(other)), the measure of CAA (Rimsky et al. 2024, section 4)."""
    return (log_probabilities[:, 0] - log_probabilities[:, 1]).sigmoid()


def _rows(chat: ChatFormat, index: int, pair: ABPair) -> list[_Row]:
    matching, other = (locate_letter(chat, pair.question, answer) for answer in (pair.matching, pair.not_matching))
    context = matching.span.token_ids[: matching.span.first]
    same_context = context == other.span.token_ids[: other.span.first]
    if matching.is_alone and other.is_alone and same_context:
        letters = tuple(found.span.token_ids[found.span.first] for found in (matching, other))
        return [_Row(index, 0, context, min(matching.n_prompt, len(context)), choices=(letters[0], letters[1]))]
    together = zip(matching.span.token_ids, other.span.token_ids, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], together))
    first = min(shared, matching.n_prompt, other.n_prompt)
    return [_answer_row(index, column, found, first) for column, found in enumerate((matching, other))]


def _answer_row(index: int, column: int, found: LetterSpan, first: int) -> _Row:
    ids = found.span.token_ids
    return _Row(index, column, ids, first, n_scored=len(ids) - first)


def _read(model: HookedModel, batch: TokenBatch, rows: Sequence[_Row], found: Float[Tensor, "pair 2"]) -> None:
    if rows[0].choices is not None:
        log_p = as_double(last_logits(model, batch)).log_softmax(-1)
        for line, row in zip(log_p, rows, strict=True):
            found[row.pair] = line[list(row.choices or ())].cpu()
        return
    n = max(row.n_scored for row in rows)
    log_p = as_double(all_logits(model, batch)[:, -n - 1 : -1]).log_softmax(-1)
    log_p = log_p.gather(-1, batch.tokens[:, -n:, None].to(log_p.device))[..., 0]
    for line, row in zip(log_p, rows, strict=True):
        found[row.pair, row.column] = line[-row.n_scored :].sum().cpu()
