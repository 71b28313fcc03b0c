"""What the model itself does with a prompt: short greedy answers judged by text, and what follows from them.

Whether a prompt is refused is read from the answer, never from a score: the first token of a real chat model is
spread over many words, so that a refused prompt can have any refusal score. The labels say which tokens begin
refusals and where the score's zero point lies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .generation import generate
from .judges.substring import is_refusal
from .measures import Prefix
from .model.points import HookedModel
from .precision import as_double
from .text.chat import ChatFormat
from .text.given import Prompts

MAX_REFUSAL_TOKENS, MAX_PREFIX = 8, 6
MIN_PROBABILITY_GAP = 0.02
"""Of the tokens that `discover_refusal_tokens` finds."""
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
    first_logits: Float[Tensor, " d_vocab"] | None = field(default=None, repr=False, compare=False)
    """Of the first token, where it was just read."""


def label_prompts(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Prompts,
    *,
    n_tokens: int = 16,
    batch_size: int = 32,
) -> list[Label]:
    """Answer every instruction greedily with up to `n_tokens` tokens, and judge the text by the substring judge.

    Examples:
        >>> [label.is_refused for label in label_prompts(model, chat, ["Hi", "Bye"], n_tokens=2)]
        [False, False]
    """
    answers = generate(
        model,
        chat,
        instructions,
        max_new_tokens=n_tokens,
        batch_size=batch_size,
        keep_first_logits=True,
        description="labelling prompts",
    )
    return [Label(each.text, each.token_ids, is_refusal(each.text), each.first_logits) for each in answers]


def find_refusal_tokens(labels: Sequence[Label]) -> tuple[Prefix, ...]:
    """First tokens that begin ≥ 5% of the refusals with precision ≥ 0.8 over all answers, most frequent first.

    Where a token begins refusals and other answers alike, as "I" can, its continuations are asked instead: the
    shortest prefixes that separate, of up to 6 tokens. At most 8, and none that was seen only once. Give it the
    training prompts of both sides. Empty where nothing separates, or nothing is refused.

    Examples:
        >>> refused, answered = Label("I cannot.", (5, 6), True), Label("Sure.", (9,), False)
        >>> find_refusal_tokens([refused, refused, answered])
        ((5,),)
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
            if n_refused < max(2, MIN_SHARE * len(refused)):
                continue
            if n_refused >= MIN_PRECISION * n_all:
                found.append((n_refused, longer))
            elif n < MAX_PREFIX:
                open_prefixes.append(longer)
    found.sort(key=lambda each: (-each[0], each[1]))
    return tuple(prefix for _, prefix in found[:MAX_REFUSAL_TOKENS])


def zero_point(scores: Float[Tensor, " prompt"], is_refused: Sequence[bool]) -> float | None:
    """The refusal score (nats) above which a prompt is best told to be refused: highest balanced accuracy.

    0, the published zero, where it separates as well as any other; else the middle of the best gap between two
    scores, the one nearest to 0 of several. None where the scores do not tell the two kinds apart (one-sided
    Kolmogorov-Smirnov test at 1%), or there is only one.

    Examples:
        >>> scores = torch.linspace(-9, 11, 20)
        >>> zero_point(scores, [score > 0 for score in scores.tolist()])
        0.0
    """
    flags = torch.tensor(list(is_refused))
    n_refused, n_answered = int(flags.sum()), int((~flags).sum())
    if not n_refused or not n_answered:
        return None
    order = scores.double().cpu().argsort(descending=True)
    values, hits = scores.double().cpu()[order], flags[order].double()
    # With the threshold below the k-th highest score: what is refused among those above, less what is answered.
    gains = hits.cumsum(0) / n_refused - (1 - hits).cumsum(0) / n_answered
    is_gap = values[1:] < values[:-1]
    least = math.sqrt(-math.log(0.01) / 2 * (n_refused + n_answered) / (n_refused * n_answered))
    if not bool(is_gap.any()) or gains[:-1][is_gap].max() <= least:
        return None
    best = (gains[:-1] >= gains[:-1][is_gap].max() - 1e-12) & is_gap
    gaps = list(zip(values[1:][best].tolist(), values[:-1][best].tolist(), strict=True))
    if any(low <= 0 < high for low, high in gaps):
        return 0.0
    return min((sum(gap) / 2 for gap in gaps), key=abs)


def discover_refusal_tokens(
    harmful_logits: Float[Tensor, "harmful d_vocab"], harmless_logits: Float[Tensor, "harmless d_vocab"]
) -> tuple[int, ...]:
    """Tokens that begin answers to harmful prompts more often: mean probability higher by 0.02 or more.

    At most 8, largest difference first. Give it prompts of the training split only.

    Raises:
        UserError: no token is that much more likely: the model does not refuse these prompts in its first token.
    """
    gap = as_double(harmful_logits).softmax(-1).mean(0) - as_double(harmless_logits).softmax(-1).mean(0)
    values, ids = gap.sort(descending=True, stable=True)
    chosen = ids[values >= MIN_PROBABILITY_GAP][:MAX_REFUSAL_TOKENS].tolist()
    if not chosen:
        raise UserError(
            f"no refusal token found: no first token is {MIN_PROBABILITY_GAP} more likely on harmful than on harmless "
            f"prompts (largest difference {values[0].item():.4f}); does this model refuse? "
            "Name the tokens with --refusal-tokens"
        )
    return tuple(chosen)


@dataclass(frozen=True)
class PublishedTokens:
    """Refusal tokens that Arditi et al. (2024, table 4) chose by eye for a model family."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]


PUBLISHED_REFUSAL_TOKENS: dict[str, tuple[PublishedTokens, ...]] = {
    "qwen": (PublishedTokens((40, 2121), ("I", "As")),),
    "qwen2": (PublishedTokens((40, 2121), ("I", "As")),),
    "gemma": (PublishedTokens((235285,), ("I",)),),
    "llama": (
        PublishedTokens((306,), ("I",)),  # Llama-2
        PublishedTokens((40,), ("I",)),  # Llama-3
        PublishedTokens((59597,), ("I",)),  # Yi
    ),
}
"""By HF model type; one entry counts only where the tokenizer decodes the ids to these texts."""


def published_refusal_tokens(model_type: str, chat: ChatFormat) -> tuple[int, ...] | None:
    """The published refusal token ids for this model family, where its tokenizer agrees with them."""
    for published in PUBLISHED_REFUSAL_TOKENS.get(model_type, ()):
        inside = max(published.token_ids) < len(chat.tokenizer)
        texts = tuple(chat.tokenizer.decode([token]).strip() for token in published.token_ids) if inside else ()
        if texts == published.texts:
            return published.token_ids
    return None
