"""From instructions to tokens: the chat template and its post-instruction positions."""

import datetime
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from ..errors import UserError
from ..files import sha256_json
from ..values import Value
from .batches import TokenBatch, left_pad
from .given import Conversations, Prompts, as_conversations
from .template import Conversation, as_parts, left_out, render_templates
from .template import Message as Message

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""The day that templates with a date are told it is, so that prompts do not change overnight."""
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_RESERVED = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of `apply_chat_template`, which are no variables of the template or not the user's to set."""
# Instructions that share no first and no last character, so that what is common belongs to the template.
_PROBES = ("Name a color", "Why do tides rise?", "Count to 10", "Say hello.")


@dataclass(frozen=True, eq=False, repr=False)
class ChatRecord(Value):
    """A chat template as it was used."""

    template_sha256: str
    system: str | None
    template_kwargs: Mapping[str, Any]
    template_date: str | None
    """What the template is told that the date is, if it asks."""
    response_prefix: str
    rendered_example: str
    post_instruction_tokens: tuple[str, ...]
    """The last is position −1."""
    allow_special_tokens: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class ChatFormat(Value):
    """How a conversation becomes the text that a chat model sees.

    The tokenizer's own template is used, with thinking off where it has such a switch and any date that it
    inserts fixed to `TEMPLATE_DATE`. `response_prefix` is text that every answer of the model begins with (an
    empty think block, a channel header); it is appended to the prompt, so that position −1 is the last token
    before the model's own first word.

    Examples:
        >>> ChatFormat(model.tokenizer, system="Be kind.").messages("Hi")
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """

    tokenizer: Any
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str = ""
    allow_special_tokens: bool = False
    """Special tokens that are written out in a message act as such; by default they are text like any other."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "this tokenizer has no chat template; refusal is studied in chat models: "
                "use the chat (instruct) version, or set tokenizer.chat_template"
            )
        for name in self.template_kwargs:
            if name in _RESERVED:
                raise UserError(f"the template argument {name!r} is reserved: it is set by this program")
            if not re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template)):
                raise UserError(f"the chat template does not use {name!r}: it would change nothing")

    def with_response_prefix(self, prefix: str) -> "ChatFormat":
        """The same format with another response prefix."""
        return replace(self, response_prefix=prefix)

    def messages(self, instruction: str) -> list[Message]:
        """One user turn, after the system message if there is one."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": instruction}]

    def render(self, conversation: Conversation) -> str:
        """The text of an instruction, or of a whole conversation, up to where the model's answer begins.

        Raises:
            UserError: the template cannot express the conversation (some have no system role).
        """
        return self.render_all([conversation])[0]

    def render_all(self, conversations: Conversations) -> list[str]:
        """The text of each conversation, as `render` gives it; many at once are faster than one by one.

        Raises:
            UserError: as `render`.
        """
        told = [self._messages(conversation) for conversation in as_conversations(conversations)]
        return [text + self.response_prefix for text in self._rendered(told)]

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of `render`; the template writes BOS itself, so none is added.

        Where a message has the text of a special token in it, that message is tokenized apart, as plain text.
        """
        return self.encode_all([conversation])[0]

    def encode_all(self, conversations: Conversations) -> list[list[int]]:
        """Token ids of each conversation, as `encode` gives them; many at once are faster than one by one."""
        told = [self._messages(conversation) for conversation in as_conversations(conversations)]
        rows = [self._encoded_apart(messages) if self._has_special(messages) else None for messages in told]
        plain = [messages for messages, row in zip(told, rows, strict=True) if row is None]
        texts = [text + self.response_prefix for text in self._rendered(plain)]
        tokenized = iter(self._tokenized_all(texts))
        return [next(tokenized) if row is None else row for row in rows]

    def _encoded_apart(self, messages: Sequence[Message]) -> list[int] | None:
        """Token ids with the text of special tokens as text; None, with a warning, where that cannot be done."""
        apart, before, after = self._tokenized_apart(messages), self.pre_instruction_ids, self.post_instruction_ids
        if apart and (tuple(apart[: len(before)]), tuple(apart[-len(after) :])) == (before, after):
            return apart
        warnings.warn(
            f"special tokens in this prompt act as such, its tokenizer cannot read them as text: "
            f"{messages[-1]['content'][:80]!r}",
            stacklevel=4,
        )
        return None

    def _messages(self, conversation: Conversation) -> list[Message]:
        return self.messages(conversation) if isinstance(conversation, str) else list(conversation)

    def _rendered(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        if not conversations:
            return []
        given = [as_parts(messages) if self._takes_parts else messages for messages in conversations]
        texts = render_templates(self.tokenizer, given, self._template, self._kwargs)
        for text, messages in zip(texts, conversations, strict=True):
            if lost := left_out(text, messages):
                raise UserError(
                    f"the chat template leaves out or rewrites this {lost['role']} message, so that the model would "
                    f"not read it: {lost['content'][:80]!r}; use another one, or set tokenizer.chat_template"
                )
        return texts

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows an instruction only where its content is a list of parts."""
        probe: list[Message] = [{"role": "user", "content": _PROBES[0]}]

        def shows(messages: Sequence[Mapping[str, Any]]) -> bool | UserError:
            try:
                return _PROBES[0] in render_templates(self.tokenizer, [messages], self._template, self._kwargs)[0]
            except UserError as error:
                return error

        return shows(probe) is not True and shows(as_parts(probe)) is True

    def _tokenized(self, text: str, **how: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **how)["input_ids"]

    def _tokenized_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Where a text has a special token written out."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        texts = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
        longest_first = sorted(texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if texts else None

    def _has_special(self, messages: Sequence[Message]) -> bool:
        """Whether a message has a special token written out that is to be text."""
        if self.allow_special_tokens or self._special is None:
            return False
        told = "\n".join([self.system or "", *(message["content"] for message in messages)])
        return self._special.search(told) is not None

    def _probed(self) -> list[list[int]]:
        """Token ids of prompts that share what belongs to the template, and the system message."""
        rows = []
        for probe in _PROBES:
            messages = self.messages(probe)
            apart = self._tokenized_apart(messages) if self._has_special(messages) else None
            rows.append(apart or self._tokenized(self.render(probe)))
        return rows

    def _tokenized_apart(self, messages: Sequence[Message]) -> list[int] | None:
        """Token ids with the messages that have special tokens in them as plain text; None where that fails."""
        assert self._special is not None
        (text,) = self._rendered([messages])
        marks = {f"\ue000{index}\ue001": each["content"] for index, each in enumerate(messages)}
        marks = {mark: content for mark, content in marks.items() if self._special.search(content)}
        hidden = {content: mark for mark, content in marks.items()}
        marked: list[Message] = [{**each, "content": hidden.get(each["content"], each["content"])} for each in messages]
        ids: list[int] = []
        special = set(self.tokenizer.all_special_ids)
        for piece in re.split("(\ue000\\d+\ue001)", self._rendered([marked])[0] + self.response_prefix):
            if piece in marks:
                content = marks[piece] if marks[piece] in text else marks[piece].strip()
                plain = self._tokenized(content, split_special_tokens=True)
                if special & set(plain):
                    return None
                ids += plain
            elif piece:
                ids += self._tokenized(piece)
        return ids

    def encode_answered(self, instruction: str, answer: str) -> tuple[list[int], int]:
        """Token ids of prompt and answer together, and the index of the answer's first token."""
        prompt = self.encode(instruction)
        text = self.render(instruction)
        if prompt != self._tokenized(text):  # a message is tokenized apart
            return [*prompt, *self._tokenized(answer)], len(prompt)
        whole = self._tokenized(text + answer)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        return whole, shared

    def batch(self, instructions: Prompts) -> TokenBatch:
        """One left-padded batch of prompts."""
        return left_pad(self.encode_all(instructions), self.pad_id)

    @property
    def pad_id(self) -> int:
        """The id under the padding; masked, so any valid id serves where the tokenizer has none."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    @cached_property
    def post_instruction_ids(self) -> tuple[int, ...]:
        """The template's token ids after the instruction: the longest suffix that all prompts share."""
        reversed_rows = [row[::-1] for row in self._probed()]
        shared = takewhile(lambda column: len(set(column)) == 1, zip(*reversed_rows, strict=False))
        ids = tuple(column[0] for column in shared)[::-1]
        if not ids:
            raise UserError("the chat template puts no token between the instruction and the answer")
        return ids

    @cached_property
    def pre_instruction_ids(self) -> tuple[int, ...]:
        """Token ids before the instruction (BOS, system message, header): the longest prefix that all prompts share."""
        shared = takewhile(lambda column: len(set(column)) == 1, zip(*self._probed(), strict=False))
        return tuple(column[0] for column in shared)

    @property
    def positions(self) -> tuple[int, ...]:
        """The post-instruction positions, counted from the end of the prompt: −n .. −1."""
        return tuple(range(-len(self.post_instruction_ids), 0))

    def record(self) -> ChatRecord:
        """What files record of the template."""
        return ChatRecord(
            sha256_json(self.tokenizer.chat_template),
            self.system,
            dict(self._kwargs),
            TEMPLATE_DATE.date().isoformat() if self._has_date else None,
            self.response_prefix,
            self.render(_PROBES[0]),
            tuple(self.tokenizer.convert_ids_to_tokens(list(self.post_instruction_ids))),
            self.allow_special_tokens,
        )

    @property
    def _has_date(self) -> bool:
        return "date_string" in self._kwargs or _DATE_CALL.search(self.tokenizer.get_chat_template()) is not None

    @cached_property
    def _template(self) -> str:
        """The template with its calls for today's date replaced by `TEMPLATE_DATE`: functions cannot be passed in."""
        template = self.tokenizer.get_chat_template()
        fixed = _DATE_CALL.sub(lambda call: f"{call[1]}{TEMPLATE_DATE.strftime(call[2])}{call[1]}", template)
        if "strftime_now(" in fixed:
            raise UserError(
                "the chat template inserts today's date in a form that cannot be fixed: "
                "set tokenizer.chat_template to one with a written date"
            )
        return fixed

    @cached_property
    def _kwargs(self) -> dict[str, Any]:
        template = str(self.tokenizer.chat_template)
        fixed: dict[str, Any] = {}
        if "enable_thinking" in template:
            fixed["enable_thinking"] = False
        if "date_string" in template:
            fixed["date_string"] = TEMPLATE_DATE.strftime("%d %b %Y")
        return {**fixed, **self.template_kwargs}
