"""The one door to chat templates: code that comes with a tokenizer and turns messages into text."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""
Conversation = str | Sequence[Message]
"""An instruction, which is one user turn, or all messages."""
MOST_SECONDS = 20.0
MOST_CHARACTERS = 1_000_000
"""What a template may add to its messages."""


def render_templates(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    template: str,
    arguments: Mapping[str, Any],
) -> list[str]:
    """The text of each conversation up to where the model's answer begins.

    Raises:
        UserError: the template refuses a conversation, fails, runs for more than 20 seconds on one, or writes far
            more text than it was given.
    """
    texts: list[str] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            for messages in conversations:
                text = tokenizer.apply_chat_template(
                    list(messages), chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
                )
                _check_length(text, messages)
                texts.append(text)
        except BaseException as error:  # foreign code: whatever it raises is said below
            raised.append(error)

    # A loop of the template cannot be stopped, only left behind. One thread for all: it costs more than a rendering.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    n_before = -1
    while thread.is_alive() and len(texts) > n_before:
        n_before = len(texts)
        thread.join(MOST_SECONDS)
    if raised:
        (error,) = raised
        if isinstance(error, UserError):
            raise error
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the chat template refuses this conversation: {kind}{reason}") from error
    if len(texts) < len(conversations):
        raise UserError(f"the chat template runs for more than {MOST_SECONDS:.0f} seconds: use another template")
    return texts


def _check_length(text: str, messages: Sequence[Mapping[str, Any]]) -> None:
    if len(text) > MOST_CHARACTERS + sum(len(str(message["content"])) for message in messages):
        raise UserError(f"the chat template writes {len(text)} characters around this conversation: use another one")


def as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same messages with their content as a list of parts, as templates of multimodal models want it."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def left_out(text: str, messages: Sequence[Message]) -> Message | None:
    """The first system or user message whose content is not in the text; white space around it does not count."""
    told = (message for message in messages if message["role"] in ("system", "user"))
    return next((message for message in told if message["content"].strip() not in text), None)
