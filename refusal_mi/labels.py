"""What the model itself does with a prompt: short greedy answers judged by text, and what follows from them.

Whether a prompt is refused is read from the answer, never from a score: the first token of a real chat model is
spread over many words, so that a refused prompt can have any refusal score. The labels say which tokens begin
refusals and where the score's zero point lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .generation import generate
from .judges.substring import is_refusal
from .measures import Prefix
from .model.points import HookedModel
from .text.chat import ChatFormat

MIN_SHARE, MIN_PRECISION = 0.05, 0.8
"""A refusal token begins at least this fraction of the refusals, and of what it begins at least this much refuses."""


@dataclass(frozen=True)
class Label:
    """The beginning of the model's greedy answer to a prompt, and whether it refuses."""

    answer: str
    token_ids: tuple[int, ...]
    """Of the answer, without a stop token."""
    is_refused: bool
    """A published refusal phrase occurs in `answer`."""


def label_prompts(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    *,
    n_tokens: int = 16,
    batch_size: int = 32,
) -> list[Label]:
    """Answer every instruction greedily with up to `n_tokens` tokens, and judge the text by the substring judge."""
    answers = generate(
        model, chat, instructions, max_new_tokens=n_tokens, batch_size=batch_size, description="labelling prompts"
    )
    return [Label(answer.text, answer.token_ids, is_refusal(answer.text)) for answer in answers]


def find_refusal_tokens(labels: Sequence[Label]) -> tuple[Prefix, ...]:
    """First tokens that begin ≥ 5% of the refusals with precision ≥ 0.8 over all answers, most frequent first.

    Where a token begins refusals and other answers alike, as "I" can, its continuations are asked instead: the
    shortest prefixes that separate. Give it the training prompts of both sides. Empty where nothing separates,
    or nothing is refused.
    """
    answers = [label.token_ids for label in labels]
    refused = [label.token_ids for label in labels if label.is_refused]
    found: list[tuple[int, Prefix]] = []
    open_prefixes: list[Prefix] = [()]
    while open_prefixes:
        prefix = open_prefixes.pop()
        n = len(prefix) + 1
        for longer in {ids[:n] for ids in refused if len(ids) >= n and ids[: n - 1] == prefix}:
            n_refused, n_all = (sum(ids[:n] == longer for ids in rows) for rows in (refused, answers))
            if n_refused < MIN_SHARE * len(refused):
                continue
            if n_refused >= MIN_PRECISION * n_all:
                found.append((n_refused, longer))
            else:
                open_prefixes.append(longer)
    return tuple(prefix for _, prefix in sorted(found, key=lambda each: (-each[0], each[1])))


def zero_point(scores: Float[Tensor, " prompt"], is_refused: Sequence[bool]) -> float:
    """The refusal score (nats) above which a prompt is best told to be refused: highest balanced accuracy.

    0, the published zero, where it separates as well as any other; else the middle of the best gap between two
    scores, the one nearest to 0 of several. 0 where nothing separates better than chance, or only one kind is there.
    """
    flags = torch.tensor(list(is_refused))
    if bool(flags.all()) or not bool(flags.any()):
        return 0.0
    values = scores.double().unique()
    edges = torch.cat([values.new_tensor([-torch.inf]), values, values.new_tensor([torch.inf])])
    refused, answered = scores[flags].double(), scores[~flags].double()
    # Between edges i and i + 1: refused are the prompts above, so those from edge i + 1 on.
    hits = (refused[None] > edges[:-1, None]).double().mean(1) + (answered[None] <= edges[:-1, None]).double().mean(1)
    if hits.max() <= 1:  # no better than chance
        return 0.0
    best = [
        (low, high)
        for low, high, hit in zip(edges[:-1].tolist(), edges[1:].tolist(), hits.tolist(), strict=True)
        if hit >= hits.max().item() - 1e-12
    ]
    if any(low <= 0 < high for low, high in best):
        return 0.0
    return min((sum(gap) / 2 for gap in best), key=abs)
