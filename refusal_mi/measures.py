"""What is measured of a model in one pass: refusal score, KL, CE loss, p of the matching answer."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice, takewhile
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .engine.jobs import Engine
from .errors import UserError
from .interventions import Interventions, all_hooks, as_interventions
from .model.points import Hook, HookedModel, explain_layer, model_device
from .model.running import all_logits, batches, last_logits, read_out, residuals, running
from .options import KLFormula
from .precision import as_double, finite, told
from .progress import track
from .stats import bootstrap_interval, ratio_of_means
from .text.batches import TokenBatch, batches_by_length
from .text.chat import ChatFormat
from .text.given import Prompts, as_prompts
from .text.pairs import ABPair, LetterSpan, locate_letter
from .values import Value, check_named, frame

SCORE_EPSILON = 1e-8
KL_EPSILON = 1e-6
MOST_NATS = math.log(sys.float_info.max)
"""Above it, perplexity overflows."""


def refusal_score(logits: Float[Tensor, "batch d_vocab"], refusal_tokens: Sequence[int]) -> Float[Tensor, " batch"]:
    """Log-odds (nats) that the next token is a refusal token: ln(P + 1e-8) − ln(1 − P + 1e-8), in float64.

    P is the summed probability of `refusal_tokens`; the score saturates at ±18.4 (Arditi et al. 2024, section 2.5).

    Examples:
        >>> refusal_score(torch.zeros(1, 2), [0]).item()  # even odds
        0.0
    """
    return log_odds(as_double(logits).softmax(-1)[:, list(refusal_tokens)].sum(-1))


def log_odds(p: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """ln(p + 1e-8) − ln(1 − p + 1e-8), in nats.

    Examples:
        >>> log_odds(torch.tensor([0.5])).item()
        0.0
    """
    return (p + SCORE_EPSILON).log() - (1 - p + SCORE_EPSILON).log()


def kl_nats(
    base_logits: Float[Tensor, "batch d_vocab"],
    changed_logits: Float[Tensor, "batch d_vocab"],
    formula: KLFormula = "exact",
) -> Float[Tensor, " batch"]:
    """KL(base ‖ changed) of the next-token distribution, in float64 nats.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> kl_nats(logits, torch.tensor([[0.0, 50.0]])).item() > 20 > kl_nats(logits, logits).item() == 0
        True

    Args:
        formula: the published one loses what lies in a long tail, and can fall below zero: over 150,000 tokens it has
            read −0.03 where the exact value is 0.49.
    """
    check_named("formula", formula, get_args(KLFormula))
    log_p, log_q = as_double(base_logits).log_softmax(-1), as_double(changed_logits).log_softmax(-1)
    p = log_p.exp()
    if formula == "published":
        return (p * ((p + KL_EPSILON).log() - (log_q.exp() + KL_EPSILON).log())).sum(-1)
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # also where a model masks a token in both
    return terms.sum(-1).clamp(min=0)  # below zero is rounding


Prefix = tuple[int, ...]
"""Token ids that an answer begins with."""
RefusalTokens = Sequence[int] | Sequence[Sequence[int]]
"""First tokens of refusals; or their prefixes, where one first token begins refusals and other answers alike."""


@dataclass(frozen=True)
class RefusalPrefixes:
    """How refusals begin, and the probability of beginning so.

    Examples:
        >>> how = RefusalPrefixes.of([5, (6, 7)])
        >>> how.contexts, how.after(()), how.after((6,))
        (((), (6,)), [5, 6], [7])
    """

    prefixes: tuple[Prefix, ...]
    """None of them the beginning of another."""

    @classmethod
    def of(cls, tokens: RefusalTokens) -> "RefusalPrefixes":
        """From first tokens, or from prefixes."""
        return cls(tuple((token,) if isinstance(token, int) else tuple(token) for token in tokens))

    def __post_init__(self) -> None:
        beginnings = {prefix[:n] for prefix in self.prefixes for n in range(len(prefix))}
        if not self.prefixes:
            raise UserError("a refusal score needs at least one refusal token; does this model refuse?")
        if len(set(self.prefixes)) < len(self.prefixes) or beginnings & set(self.prefixes) or () in self.prefixes:
            raise UserError("refusal tokens must differ, and no prefix may begin with another")

    @cached_property
    def contexts(self) -> tuple[Prefix, ...]:
        """What a prompt is continued with to read all of the probability: nothing first, then beginnings by length."""
        return tuple(
            sorted({prefix[:n] for prefix in self.prefixes for n in range(len(prefix))} | {()}, key=_by_length)
        )

    def after(self, context: Prefix) -> list[int]:
        """The ids that may follow a context: those that end a prefix first, then those that go on."""
        ends = [prefix[-1] for prefix in self.prefixes if prefix[:-1] == context]
        return ends + [each[-1] for each in self.contexts if each and each[:-1] == context]

    def score(self, logits: Float[Tensor, "context batch d_vocab"]) -> Float[Tensor, " batch"]:
        """`refusal_score` with P the summed probability of the prefixes; next-token logits after every context."""
        rows = zip(self.contexts, logits, strict=True)
        return self.score_of([as_double(each).softmax(-1)[:, self.after(context)] for context, each in rows])

    def score_of(self, p: Sequence[Float[Tensor, "batch _"]]) -> Float[Tensor, " batch"]:
        """The same from the probabilities of the ids `after` every context."""
        of_context: dict[Prefix, Tensor] = {(): p[0].new_ones(len(p[0]))}
        total = torch.zeros_like(of_context[()])
        for context, columns in zip(self.contexts, p, strict=True):
            n_ends = sum(prefix[:-1] == context for prefix in self.prefixes)
            total = total + of_context[context] * columns[:, :n_ends].sum(-1)
            for token, column in zip(self.after(context)[n_ends:], columns.T[n_ends:], strict=True):
                of_context[(*context, token)] = of_context[context] * column
        return log_odds(total)


def _by_length(prefix: Prefix) -> tuple[int, Prefix]:
    return len(prefix), prefix


def refusal_scores(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Prompts,
    refusal_tokens: RefusalTokens,
    *,
    interventions: Interventions = (),
    first: Float[Tensor, "prompt d_vocab"] | None = None,
    batch_size: int = 32,
) -> Float[Tensor, " prompt"]:
    """Refusal score (nats) of the answer to each instruction, on the CPU, under interventions.

    Examples:
        >>> refusal_scores(model, chat, ["Hi", "Bye"], [5, 6]).shape
        torch.Size([2])

    Args:
        first: logits of the first token, where they have been read; only what follows it is read then.
    """
    instructions, interventions = as_prompts(instructions), as_interventions(interventions)
    prefixes, p = RefusalPrefixes.of(refusal_tokens), list[Tensor]()
    for context in prefixes.contexts:
        ids = prefixes.after(context)
        p.append(torch.empty(len(instructions), len(ids), dtype=torch.float64))
        read = _next_tokens(model, chat, instructions, interventions, context, batch_size)
        if first is not None and not context:
            places = torch.arange(len(instructions)).split(batch_size)
            read = ((some.tolist(), first[some]) for some in places)
        for indices, logits in read:
            p[-1][indices] = as_double(logits).softmax(-1)[:, ids].double().cpu()
    return prefixes.score_of(p)


def next_token_logits(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Prompts,
    *,
    interventions: Interventions = (),
    after: Prefix = (),
    batch_size: int = 32,
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits of the first token of the answer to each instruction, on the CPU, under interventions.

    Examples:
        >>> plain = next_token_logits(model, chat, "Hi")
        >>> plain.equal(next_token_logits(model, chat, "Hi", interventions=Ablate(direction)))
        False

    Args:
        after: token ids that every answer is made to begin with; the logits are those of the token after them.
    """
    instructions, interventions = as_prompts(instructions), as_interventions(interventions)
    logits: list[Tensor] = [torch.empty(0)] * len(instructions)
    for indices, rows in _next_tokens(model, chat, instructions, interventions, after, batch_size):
        for index, row in zip(indices, rows.cpu(), strict=True):
            logits[index] = row
    return torch.stack(logits)


def _next_tokens(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    interventions: Interventions,
    after: Prefix,
    batch_size: int,
) -> Iterator[tuple[list[int], Float[Tensor, "batch d_vocab"]]]:
    """Places of some instructions and their next-token logits, batch by batch."""
    rows = [[*row, *after] for row in chat.encode_all(instructions)]
    for indices, batch in batches(model, rows, chat.pad_id, batch_size, description="reading next tokens"):
        hooks = all_hooks(model, interventions, batch.tokens.shape[1] - len(after))
        with torch.no_grad(), running(model, hooks):
            logits = last_logits(model, batch)
        yield indices, told(finite(logits))


MOST_LOGITS = 2**22
"""Logits that are held at once, 16 MB in float32; those of at least 64 positions."""
PASS_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most tokens in a pass: more of them are no faster and hold more memory."""
MAX_TEXT_TOKENS = 256
"""Plain texts are cut to this many tokens, as in the published evaluation."""


@dataclass(frozen=True)
class ScoredText:
    """Token ids and the index of the first one that is predicted; those before it are only context.

    Examples:
        >>> (text,) = answers_to_score(chat, [("Hi", "Hello.")])
        >>> text.token_ids[: text.first] == tuple(chat.encode("Hi"))
        True
    """

    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of one text.

    Examples:
        >>> LossResult.of([TextLoss(nats=6.0, n_tokens=3), TextLoss(nats=2.0, n_tokens=1)]).ce_loss
        2.0
    """

    nats: float
    """Summed over its predicted tokens."""
    n_tokens: int


@dataclass(frozen=True)
class LossResult:
    """Mean cross-entropy over predicted tokens.

    Examples:
        >>> found = ce_loss(model, chat, "a plain text")
        >>> found.perplexity == pytest.approx(2.718281828 ** found.ce_loss)
        True
    """

    ce_loss: float
    """Nats per token."""
    perplexity: float
    """exp of it, at most the largest number that a file can hold (of a loss over 709 nats)."""
    n_tokens: int
    change: tuple[float, float, float] | None = None
    """Nats per token above the plain model on the same texts, with its 95% interval; None where that was not asked."""

    @classmethod
    def of(cls, losses: Sequence[TextLoss], plain: Sequence[TextLoss] | None = None) -> "LossResult":
        """Every predicted token counts once; `plain` are the same texts under the plain model.

        The interval of the change is by the BCa bootstrap over texts.

        Examples:
            >>> LossResult.of([TextLoss(6.0, 3), TextLoss(1.0, 1)], [TextLoss(3.0, 3), TextLoss(0.0, 1)])
            LossResult(ce_loss=1.75, perplexity=5.754602676005731, n_tokens=4, change=(1.0, 1.0, 1.0))
        """
        counts = [loss.n_tokens for loss in losses]
        mean = math.fsum(loss.nats for loss in losses) / sum(counts)
        perplexity = math.exp(min(mean, MOST_NATS))
        if plain is None:
            return cls(mean, perplexity, sum(counts))
        changes = [loss.nats - before.nats for loss, before in zip(losses, plain, strict=True)]
        change = bootstrap_interval(changes, list(map(float, counts)), statistic=ratio_of_means)
        return cls(mean, perplexity, sum(counts), change)

    def describe(self) -> dict[str, Any]:
        """The published keys, and the change where it is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def answers_to_score(chat: ChatFormat, pairs: Sequence[tuple[str, str]]) -> list[ScoredText]:
    """(instruction, answer) pairs of which the answer's tokens are predicted; empty answers are left out.

    Examples:
        >>> answers_to_score(chat, [("Hi", "Hello."), ("Bye", "")])[0].first == len(chat.encode("Hi"))
        True
    """
    encoded = [chat.encode_answered(instruction, answer) for instruction, answer in pairs]
    return [ScoredText(tuple(ids), first) for ids, first in encoded if first < len(ids)]


def texts_to_score(chat: ChatFormat, texts: Prompts) -> list[ScoredText]:
    """Plain texts, without the chat template, of which every token after the first is predicted.

    Examples:
        >>> texts_to_score(chat, "a text")[0].first
        1
    """
    rows = [chat.tokenizer(text)["input_ids"][:MAX_TEXT_TOKENS] for text in as_prompts(texts, "texts")]
    return [ScoredText(tuple(row), 1) for row in rows if len(row) > 1]


def ce_loss(
    model: HookedModel,
    chat: ChatFormat,
    texts: Sequence[ScoredText] | Prompts,
    *,
    interventions: Interventions = (),
    batch_size: int = 8,
    description: str = "CE loss",
    engine: Engine | None = None,
) -> LossResult:
    """Cross-entropy (nats per token) of `texts`; every predicted token counts once, summed in float64.

    Examples:
        >>> ce_loss(model, chat, "a plain text").ce_loss > 0
        True

    Args:
        texts: plain texts, or what `texts_to_score` and `answers_to_score` make.
        engine: where the batches run, the same ones; None is here.

    Raises:
        UserError: no text has a token to predict, or the loss is not finite.
    """
    given: dict[str, Any] = {"batch_size": batch_size, "description": description, "engine": engine}
    return LossResult.of(text_losses(model, chat, texts, interventions=interventions, **given))


def text_losses(
    model: HookedModel,
    chat: ChatFormat,
    texts: Sequence[ScoredText] | Prompts,
    *,
    interventions: Interventions = (),
    batch_size: int = 8,
    description: str = "CE loss",
    engine: Engine | None = None,
) -> list[TextLoss]:
    """That of every text which has a token to predict, in their order.

    Examples:
        >>> losses = text_losses(model, chat, ["a plain text", "another one"])
        >>> LossResult.of(losses) == ce_loss(model, chat, ["a plain text", "another one"])
        True

    Raises:
        UserError: as `ce_loss`.
    """
    interventions = as_interventions(interventions)
    is_ready = isinstance(texts, list | tuple) and all(isinstance(text, ScoredText) for text in texts)
    texts = [text for text in (texts if is_ready else texts_to_score(chat, texts)) if text.first < len(text.token_ids)]
    if not texts:
        raise UserError(f"{description} needs at least one text with a token to predict; these are all empty")
    sums = [0.0] * len(texts)
    most_tokens = PASS_TOKENS.get(model_device(model).type, PASS_TOKENS["cpu"])
    rows = [text.token_ids for text in texts]
    if engine is not None:
        groups = batches_by_length(rows, batch_size, most_tokens=most_tokens)
        items = [TextBatch(tuple(texts[index] for index in indices)) for indices in groups]
        losses_of: dict[int, TextLoss] = {}
        for number, some in track(engine.run(Losing(chat, interventions), model, items), description, total=len(items)):
            losses_of |= zip(groups[number], some, strict=True)
        return [losses_of[index] for index in range(len(rows))]
    for indices, batch in batches(
        model, rows, chat.pad_id, batch_size, description=description, most_tokens=most_tokens
    ):
        scored = [len(rows[index]) - texts[index].first for index in indices]
        prompt_width = batch.tokens.shape[1] - torch.tensor(scored)
        losses = iter(_token_losses(model, batch, scored, all_hooks(model, interventions, prompt_width)))
        for index, n in zip(indices, scored, strict=True):
            sums[index] = math.fsum(islice(losses, n))
    if not all(map(math.isfinite, sums)):
        raise UserError("the CE loss is not finite in the model's dtype under this intervention; try --dtype float32")
    return [TextLoss(nats, len(text.token_ids) - text.first) for nats, text in zip(sums, texts, strict=True)]


@dataclass(frozen=True)
class TextBatch:
    """An item of `Losing`."""

    texts: tuple[ScoredText, ...]

    def __str__(self) -> str:
        return f"{len(self.texts)} texts of up to {len(self.texts[0].token_ids)} tokens"


@dataclass(frozen=True, eq=False, repr=False)
class Losing(Value):
    """`text_losses` as an engine's job, whose items are the texts of one batch."""

    chat: ChatFormat
    interventions: tuple[Any, ...]

    def start(self, model: HookedModel) -> Callable[[TextBatch], list[TextLoss]]:
        """Losses of a batch."""

        def losses(batch: TextBatch) -> list[TextLoss]:
            some, n = list(batch.texts), len(batch.texts)
            return text_losses(model, self.chat, some, interventions=self.interventions, batch_size=n)

        return losses


def _token_losses(model: HookedModel, batch: TokenBatch, scored: Sequence[int], hooks: Sequence[Hook]) -> list[float]:
    """Losses of the last `scored` tokens of every row; only the logits that predict them are computed."""
    (stream,) = residuals(model, batch, [model.cfg.n_layers], max(scored) + 1, hooks=hooks)
    before = torch.cat([row[-n - 1 : -1] for row, n in zip(stream, scored, strict=True)])
    targets = torch.cat([row[-n:] for row, n in zip(batch.tokens, scored, strict=True)])
    found: list[float] = []
    n_rows = max(64, MOST_LOGITS // model.cfg.d_vocab)
    with torch.no_grad(), running(model, hooks):  # somebody's own intervention may act on the norm or the unembedding
        for some, ids in zip(before.split(n_rows), targets.split(n_rows), strict=True):
            logits = read_out(model, some[None])[0]
            losses = functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="none"
            )
            found += losses.tolist()
    return found


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
    """A/B pairs, tokenized once for many forward passes.

    Examples:
        >>> questions = ABQuestions(chat, load_pairs("organism_ab").pairs[:2])
        >>> p_matching(questions.log_probabilities(model)).shape
        torch.Size([2])
    """

    def __init__(self, chat: ChatFormat, pairs: Sequence[ABPair]) -> None:
        self.pad_id, self.pairs = chat.pad_id, tuple(pairs)
        self.rows = [row for index, pair in enumerate(pairs) for row in _rows(chat, index, pair)]

    @property
    def n_by_letter(self) -> int:
        """Pairs read from the letter token alone; the others from the whole continuation."""
        return sum(row.choices is not None for row in self.rows)

    def log_probabilities(
        self, model: HookedModel, interventions: Interventions = (), *, batch_size: int = 32
    ) -> Float[Tensor, "pair 2"]:
        """ln p of the matching and of the other answer, in float64.

        Read from the letter token after the prompt and the bracket. Where the tokenizer merges letter and bracket, or
        writes the two answers with different beginnings, ln p of the whole answer.
        """
        interventions = as_interventions(interventions)
        table = torch.full((len(self.pairs), 2), torch.nan, dtype=torch.float64)
        groups = [row for row in self.rows if row.choices], [row for row in self.rows if not row.choices]
        for group in filter(None, groups):
            ids = [row.token_ids for row in group]
            description = "reading A/B questions"
            for indices, batch in batches(model, ids, self.pad_id, batch_size, description=description, is_shown=False):
                rows = [group[index] for index in indices]
                padding = batch.tokens.shape[1] - torch.tensor([len(row.token_ids) for row in rows])
                widths = padding + torch.tensor([row.n_prompt for row in rows])
                with torch.no_grad(), running(model, all_hooks(model, interventions, widths)):
                    _read_(model, batch, rows, table)
        return table


def p_matching(log_probabilities: Float[Tensor, "pair 2"]) -> Float[Tensor, " pair"]:
    """p(matching) / (p(matching) + p(other)), the measure of CAA (Rimsky et al. 2024, section 4).

    Examples:
        >>> p_matching(torch.tensor([[0.25, 0.75]]).log()).item()
        0.25
    """
    return (log_probabilities[:, 0] - log_probabilities[:, 1]).sigmoid()


def _rows(chat: ChatFormat, index: int, pair: ABPair) -> list[_Row]:
    matching, other = (locate_letter(chat, pair.question, answer) for answer in (pair.matching, pair.not_matching))
    context = matching.span.token_ids[: matching.span.first]
    same_context = context == other.span.token_ids[: other.span.first]
    if matching.is_alone and other.is_alone and same_context:
        letters = tuple(letter.span.token_ids[letter.span.first] for letter in (matching, other))
        return [_Row(index, 0, context, min(matching.n_prompt, len(context)), choices=(letters[0], letters[1]))]
    together = zip(matching.span.token_ids, other.span.token_ids, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], together))
    first = min(shared, matching.n_prompt, other.n_prompt)
    return [answer_row(index, column, answer, first) for column, answer in enumerate((matching, other))]


def answer_row(index: int, column: int, answer: LetterSpan, first: int) -> _Row:
    """The row that scores a whole answer, from its first token that the two answers do not share."""
    ids = answer.span.token_ids
    return _Row(index, column, ids, first, n_scored=len(ids) - first)


def _read_(model: HookedModel, batch: TokenBatch, rows: Sequence[_Row], table: Float[Tensor, "pair 2"]) -> None:
    """Fill in the log probabilities of a batch."""
    if rows[0].choices is not None:
        log_p = as_double(told(finite(last_logits(model, batch)))).log_softmax(-1)
        for line, row in zip(log_p, rows, strict=True):
            table[row.pair] = line[list(row.choices or ())].cpu()
        return
    n = max(row.n_scored for row in rows)
    log_p = as_double(all_logits(model, batch)[:, -n - 1 : -1]).log_softmax(-1)
    log_p = log_p.gather(-1, batch.tokens[:, -n:, None].to(log_p.device))[..., 0]
    finite(log_p, "the log probabilities of the answers")
    for line, row in zip(log_p, rows, strict=True):
        table[row.pair, row.column] = line[-row.n_scored :].sum().cpu()


@dataclass(frozen=True)
class ABPoint:
    """Mean p(matching answer) with a vector added to the output of one block.

    Examples:
        >>> point = ABPoint(2, 1.0, p=0.5, low=0.4, high=0.6, delta=0.1, delta_low=0.0, delta_high=0.2, n_pairs=9)
        >>> ABSweep("held-out pairs", 0.4, (point,), 9).at(2, 1.0).p
        0.5
    """

    layer: int
    """CAA's layer."""
    multiplier: float
    p: float
    low: float
    high: float
    """95% interval of the mean."""
    delta: float
    """p − p of the plain model."""
    delta_low: float
    delta_high: float
    """95% interval of the mean change, pair by pair."""
    n_pairs: int

    def describe(self) -> dict[str, Any]:
        """JSON values: the fields, and the layer in words."""
        return {**vars(self), "layer_means": explain_layer(self.layer)}


@dataclass(frozen=True, eq=False, repr=False)
class ABSweep(Value):
    """All layers and multipliers on one set of pairs.

    Examples:
        >>> point = ABPoint(2, 1.0, p=0.5, low=0.4, high=0.6, delta=0.1, delta_low=0.0, delta_high=0.2, n_pairs=9)
        >>> found = ABSweep("held-out pairs", 0.4, (point,), 9)
        >>> found.at(2, 1.0).delta, found.largest_change
        (0.1, 0.1)
    """

    pairs: str
    plain: float
    """p(matching) of the plain model."""
    points: tuple[ABPoint, ...]
    n_by_letter: int
    """Pairs read from the letter token; the others from the whole answer."""

    def at(self, layer: int, multiplier: float) -> ABPoint:
        """The point at a layer and multiplier."""
        return next(point for point in self.points if (point.layer, point.multiplier) == (layer, multiplier))

    def to_frame(self) -> Any:
        """A pandas table with a row for each layer (CAA's) and multiplier.

        Raises:
            UserError: pandas is not installed.
        """
        return frame([point.describe() for point in self.points])

    def effects(self) -> list[tuple[float, int, float]]:
        """(effect, layer, m) for every layer and m > 0 swept with both signs, largest first.

        The effect is the smaller of what adding raises and what subtracting lowers.
        """
        deltas = {(point.layer, point.multiplier): point.delta for point in self.points}
        both = [
            (min(delta, -deltas[layer, -m]), layer, m)
            for (layer, m), delta in deltas.items()
            if m > 0 and (layer, -m) in deltas
        ]
        return sorted(both, key=lambda entry: -entry[0])

    @property
    def largest_change(self) -> float:
        """The largest change of p in either direction, at any layer and multiplier."""
        return max((abs(point.delta) for point in self.points), default=0.0)
