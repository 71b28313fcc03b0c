"""Completions under interventions: answers, streams, conversations."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .engine.jobs import Engine
from .errors import UserError
from .interventions import Interventions, KeepsRows, all_hooks, as_interventions
from .model.points import Hook, HookedModel, check_raw_basis, model_device, stop_token_ids
from .model.running import Sampling as Sampling
from .model.running import check_fits, continued, keep_rows_, last_logits, prefix_logits_and_cache, running
from .precision import finite, told
from .progress import track
from .text.batches import TokenBatch, batches_by_length, left_pad
from .text.chat import ChatFormat, Message
from .text.given import Conversations, Prompts, as_conversations, as_prompts
from .values import Value

MOST_LIVE = 0.75
"""Answers that have ended leave a batch once at most this fraction of it goes on."""


@dataclass(frozen=True)
class Generated:
    """What the model wrote after one prompt.

    Examples:
        >>> (answer,) = generate(model, chat, "Hi", max_new_tokens=3)
        >>> chat.tokenizer.decode(answer.token_ids) == answer.text, len(answer.token_ids) <= 3
        (True, True)
    """

    text: str
    token_ids: tuple[int, ...]
    """The generated ids, without the stop token and what follows it."""
    is_finished: bool
    """Whether the model ended the answer itself, rather than being cut off."""
    first_logits: Float[Tensor, " d_vocab"] | None = field(default=None, repr=False, compare=False)
    """Of the first token, on the CPU, where they were asked for."""


def generate(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Conversations,
    *,
    interventions: Interventions = (),
    max_new_tokens: int = 512,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    use_kv_cache: bool = True,
    keep_first_logits: bool = False,
    description: str = "generating",
    engine: Engine | None = None,
) -> list[Generated]:
    """One answer per instruction; the interventions act on the prompt and on every generated token.

    An answer that would run past the model's context ends there. Raises a UserError for a prompt that fills it.

    Examples:
        >>> answers = generate(model, chat, ["Hi", "Bye"], interventions=Ablate(direction), max_new_tokens=3)
        >>> [len(answer.token_ids) <= 3 for answer in answers]
        [True, True]

    Args:
        instructions: user messages (a string is one), or whole conversations that end with one.
        batch_size: prompts per batch; greedy text does not depend on it, sampled text does.
        sampling: None for greedy decoding.
        use_kv_cache: False recomputes the whole text at every token: slow, the same text.
        keep_first_logits: with the logits of each first token; greedy and cached only.
        engine: where the batches run, the same ones; None is here. Greedy and cached only.
    """
    check_raw_basis(model)
    if (keep_first_logits or engine is not None) and (sampling is not None or not use_kv_cache):
        what = "an engine gives" if engine is not None else "first logits are kept of"
        raise UserError(f"{what} greedy, cached answers only")
    instructions, interventions = as_conversations(instructions), as_interventions(interventions)
    rows = chat.encode_all(instructions)
    rooms = [_room(model, *each, max_new_tokens) for each in zip(instructions, rows, strict=True)]
    check_fits(model, rows)
    stops = stop_token_ids(model)
    answers: dict[int, Generated] = {}
    if engine is not None:
        batches = _batches(rows, rooms, batch_size)
        items = [Batch(tuple(instructions[index] for index in indices)) for indices in batches]
        runs = engine.run(Answering(chat, interventions, max_new_tokens, keep_first_logits), model, items)
        for number, some in track(runs, description, total=len(items)):
            answers |= zip(batches[number], some, strict=True)
        return [answers[index] for index in range(len(rows))]
    with torch.random.fork_rng(enabled=sampling is not None), torch.no_grad():
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        for indices in track(_batches(rows, rooms, batch_size), description):
            batch = left_pad([rows[index] for index in indices], chat.pad_id).to(model_device(model))
            width = batch.tokens.shape[1]
            room = rooms[indices[0]]
            hooks = all_hooks(model, interventions, width)
            first: Sequence[Tensor | None] = [None] * len(indices)
            with running(model, hooks):
                if sampling is None and use_kv_cache:
                    new_ids, logits = _greedy(model, batch, room, stops, hooks)
                    first = list(logits.cpu()) if keep_first_logits else first
                else:
                    new_ids = continued(model, batch, room, stops, sampling, use_kv_cache=use_kv_cache).tolist()
            for index, ids, row in zip(indices, new_ids, first, strict=True):
                answers[index] = replace(_read(chat, ids, stops), first_logits=row)
    return [answers[index] for index in range(len(rows))]


@dataclass(frozen=True)
class Batch:
    """An item of `Answering`."""

    conversations: tuple[str | Sequence[Message], ...]

    def __str__(self) -> str:
        return f"{len(self.conversations)} prompts from {str(self.conversations[0])[:60]!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Answering(Value):
    """`generate` as an engine's job, whose items are the prompts of one batch."""

    chat: ChatFormat
    interventions: tuple[Any, ...]
    max_new_tokens: int
    keep_first_logits: bool = False

    def start(self, model: HookedModel) -> Callable[[Batch], list[Generated]]:
        """Answers of a batch."""
        how = {"interventions": self.interventions, "max_new_tokens": self.max_new_tokens}

        def answer(batch: Batch) -> list[Generated]:
            some, n = list(batch.conversations), len(batch.conversations)
            return generate(model, self.chat, some, **how, batch_size=n, keep_first_logits=self.keep_first_logits)  # type: ignore[arg-type]

        return answer


def complete(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    interventions: Interventions = (),
    max_new_tokens: int = 256,
    until: Sequence[str] = (),
    batch_size: int = 8,
    description: str = "generating",
) -> list[str]:
    """What the model writes greedily after token ids, without a chat template, up to the first of some texts.

    Examples:
        >>> rows = [chat.tokenizer.encode(text) for text in ("One, two", "Once")]
        >>> len(complete(model, rows, chat.pad_id, max_new_tokens=3))
        2

    Args:
        rows: token ids, with room in the context for as many new ones.
        until: texts at which a continuation ends; they are not part of it.

    Raises:
        UserError: a row and its new tokens do not fit into the model's context.
    """
    check_raw_basis(model)
    interventions, tokenizer, ends = as_interventions(interventions), model.tokenizer, [each for each in until if each]
    longest = max(map(len, rows), default=0)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise UserError(
            f"{longest} tokens and {max_new_tokens} new ones do not fit into the model's context of {model.cfg.n_ctx}"
        )
    check_fits(model, rows)

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    def has_ended(ids: list[int]) -> bool:
        text = text_of(ids) if ends else ""
        return any(end in text for end in ends)

    texts: dict[int, str] = {}
    stops = stop_token_ids(model)
    with torch.no_grad():
        for indices in track(batches_by_length(rows, batch_size), description):
            batch = left_pad([rows[index] for index in indices], pad_id).to(model_device(model))
            hooks = all_hooks(model, interventions, batch.tokens.shape[1])
            with running(model, hooks):
                new_ids, _ = _greedy(model, batch, max_new_tokens, stops, hooks, has_ended)
            for index, ids in zip(indices, new_ids, strict=True):
                text = text_of(list(takewhile(lambda token: token not in stops, ids)))
                texts[index] = text[: min([len(text), *(text.index(end) for end in ends if end in text)])]
    return [texts[index] for index in range(len(rows))]


def stream(
    model: HookedModel,
    chat: ChatFormat,
    conversation: str | Sequence[Message],
    *,
    interventions: Interventions = (),
    max_new_tokens: int = 512,
    use_kv_cache: bool = True,
) -> Iterator[Generated]:
    """The greedy answer as it grows, once per token; the last one is what `generate` returns.

    The text holds back trailing space and what a later token may still change, half characters and runs of single
    bytes, so that each is the beginning of the next. Hooks are on the model only while it computes a token: between
    tokens other code, or another stream, may use it.

    Examples:
        >>> *_, last = stream(model, chat, "Hi", max_new_tokens=3)
        >>> last == generate(model, chat, "Hi", max_new_tokens=3)[0]
        True
    """
    check_raw_basis(model)
    interventions, ids = as_interventions(interventions), chat.encode(conversation)
    room = _room(model, conversation, ids, max_new_tokens)
    check_fits(model, [ids])
    stops, past, new = stop_token_ids(model), None, list[int]()
    hooks = all_hooks(model, interventions, len(ids))
    batch = left_pad([ids], chat.pad_id).to(model_device(model))
    for _ in range(room):
        with torch.no_grad(), running(model, hooks):
            if use_kv_cache:
                latest = batch.tokens if past is None else batch.tokens[:, -1:]
                logits, past = prefix_logits_and_cache(model, latest, past)
            else:
                logits = last_logits(model, batch)
        new.append(int(logits[0].argmax()))
        if not finite(logits[0, new[-1]]):
            told(logits)
        is_last = new[-1] in stops or len(new) == room
        yield _read(chat, new, stops) if is_last else Generated(_settled(chat, new), tuple(new), False)
        if is_last:
            return
        batch = left_pad([[*ids, *new]], chat.pad_id).to(model_device(model))


def discover_response_prefix(
    model: HookedModel, chat: ChatFormat, instructions: Prompts, *, n_tokens: int = 12, batch_size: int = 32
) -> str:
    """The text of special tokens that every greedy answer begins with (an empty think block, a channel header).

    Only a shared beginning that starts with one of the tokenizer's added tokens counts, up to the last such token
    and the white space after it: ordinary words that all answers share are the model's own.
    """
    answers = generate(
        model,
        chat,
        as_prompts(instructions),
        max_new_tokens=n_tokens,
        batch_size=batch_size,
        description="looking for a prefix",
    )
    columns = takewhile(
        lambda column: len(set(column)) == 1, zip(*(answer.token_ids for answer in answers), strict=False)
    )
    shared = [column[0] for column in columns]
    added = set(chat.tokenizer.get_added_vocab().values())
    if not shared or shared[0] not in added:
        return ""
    end = max(index for index, token in enumerate(shared) if token in added) + 1
    while end < len(shared) and not chat.tokenizer.decode([shared[end]]).strip():
        end += 1
    return chat.tokenizer.decode(shared[:end], skip_special_tokens=False)


def _greedy(
    model: HookedModel,
    batch: TokenBatch,
    max_new_tokens: int,
    stops: tuple[int, ...],
    hooks: Sequence[Hook],
    has_ended: Callable[[list[int]], bool] = lambda _: False,
) -> tuple[list[list[int]], Float[Tensor, "batch d_vocab"]]:
    """New ids of every row, up to its stop token; rows that have ended do not run on for the others' sake.

    And the logits of the first of them.
    """

    def is_over(ids: list[int]) -> bool:
        return ids[-1] in stops or has_ended(ids)

    answers: list[list[int]] = [[] for _ in batch.tokens]
    live, tokens, mask, past, first = answers, batch.tokens, batch.mask, None, None
    for _ in range(max_new_tokens):
        logits, past = prefix_logits_and_cache(model, tokens, past, mask)
        first = logits if first is None else first
        latest = logits.argmax(-1)
        if not finite(logits.gather(-1, latest[:, None])).all():  # NaN where any is; a masked entry stays out
            told(logits)
        for ids, token in zip(live, latest.tolist(), strict=True):
            if not ids or not is_over(ids):
                ids.append(token)
        going_on = [line for line, ids in enumerate(live) if not is_over(ids)]
        if not going_on:
            break
        if len(going_on) <= MOST_LIVE * len(live):
            lines = torch.tensor(going_on, device=latest.device)
            live, latest, mask = [live[line] for line in going_on], latest[lines], mask[lines]
            keep_rows_(past, lines)
            for _, hook in hooks:
                if isinstance(hook, KeepsRows):
                    hook.keep_rows_(lines)
        tokens, mask = latest[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
    assert first is not None
    return answers, first


def _room(model: HookedModel, asked: str | Sequence[Message], prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens an answer may have: what was asked for, as far as the context goes."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    room = min(max_new_tokens, model.cfg.n_ctx - len(prompt))
    if room < 1:
        text = asked if isinstance(asked, str) else asked[-1]["content"]
        raise UserError(
            f"no room for an answer: the prompt has {len(prompt)} tokens of the model's {model.cfg.n_ctx}, and "
            f"{max_new_tokens} new ones were asked for (--max-new-tokens); shorten {text[:60]!r}"
        )
    return room


def _batches(rows: Sequence[Sequence[int]], rooms: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length and equal room, so that no answer is cut for its neighbor's length."""
    batches = []
    for room in sorted(set(rooms)):
        group = [index for index, each in enumerate(rooms) if each == room]
        parts = batches_by_length([rows[index] for index in group], batch_size)
        batches += [[group[index] for index in part] for part in parts]
    return batches


def _read(chat: ChatFormat, ids: Sequence[int], stops: tuple[int, ...]) -> Generated:
    kept = tuple(takewhile(lambda token: token not in stops, ids))
    is_finished = len(kept) < len(ids)
    return Generated(_text(chat, kept) if is_finished else _whole(chat, kept), kept, is_finished)


def _text(chat: ChatFormat, ids: Sequence[int]) -> str:
    """What was written: spaces that a tokenizer would take back before punctuation stay."""
    return chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _whole(chat: ChatFormat, ids: Sequence[int]) -> str:
    """The text of an answer that was cut off, maybe inside a character; all characters before that one are kept."""
    n_left_out = range(min(len(_bytes_at_end(chat, ids)), 3) + 1)
    return max((_up_to_half(_text(chat, ids[: len(ids) - n])) for n in n_left_out), key=len)


def _settled(chat: ChatFormat, ids: Sequence[int]) -> str:
    """The text so far that no later token can change."""
    return _up_to_half(_text(chat, ids[: len(ids) - len(_bytes_at_end(chat, ids))]))


def _up_to_half(text: str) -> str:
    """Without the half character at the end that decodes to a replacement character."""
    return text.rstrip("�").rstrip() if text.endswith("�") else text


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _bytes_at_end(chat: ChatFormat, ids: Sequence[int]) -> list[str]:
    """The tokens at the end that are single bytes: a run of them is decoded as one, and is lost unless it is UTF-8."""
    names = map(chat.tokenizer.convert_ids_to_tokens, reversed(ids))
    return list(takewhile(lambda name: _BYTE.fullmatch(name or ""), names))


@dataclass
class Conversation:
    """Messages so far, and how the next answer is made.

    The whole conversation goes through the chat template at every turn, and the interventions act on all of it and
    on every generated token.

    Examples:
        >>> conversation = Conversation(model, chat, max_new_tokens=3)
        >>> answer = "".join(conversation.ask("Hi"))
        >>> [message["role"] for message in conversation.messages]
        ['user', 'assistant']
    """

    model: HookedModel
    chat: ChatFormat
    interventions: Interventions = ()
    max_new_tokens: int = 512
    messages: list[Message] = field(default_factory=list)
    """User and assistant turns; the system message belongs to `chat`."""

    def __post_init__(self) -> None:
        self.interventions = as_interventions(self.interventions)

    def ask(self, text: str) -> Iterator[str]:
        """The answer to the next user message, in pieces as they are generated.

        When the reader stops early, or an interrupt arrives, the turn stays with what was written until then; a turn
        without any answer is dropped.

        Raises:
            UserError: the template refuses the conversation, or it is too long for the model.
        """
        turn: list[Message] = [*self.messages, {"role": "user", "content": text}]
        answer = Generated("", (), False)
        shown = ""
        try:
            for answer in stream(
                self.model,
                self.chat,
                self._with_system(turn),
                interventions=self.interventions,
                max_new_tokens=self.max_new_tokens,
            ):
                yield answer.text[len(shown) :]
                shown = answer.text
        finally:
            if answer.token_ids or answer.is_finished:
                self.messages = [*turn, {"role": "assistant", "content": answer.text}]

    def set_system(self, system: str | None) -> None:
        """Change the system message from the next turn on; None leaves it to the template.

        Raises:
            UserError: the template has no system role; nothing is changed.
        """
        chat = replace(self.chat, system=system)
        chat.render("?")
        self.chat = chat

    def reset(self) -> None:
        """Forget all turns; the system message and the interventions stay."""
        self.messages = []

    def describe(self) -> dict[str, Any]:
        """System message and turns as JSON values."""
        return {"system": self.chat.system, "messages": [dict(message) for message in self.messages]}

    def _with_system(self, turn: Sequence[Message]) -> list[Message]:
        system = [] if self.chat.system is None else [{"role": "system", "content": self.chat.system}]
        return [*system, *turn]
