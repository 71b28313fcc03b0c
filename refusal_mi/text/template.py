"""The one door to chat templates: code that comes with a tokenizer and turns messages into text."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""
MOST_SECONDS = 20.0
MOST_CHARACTERS = 1_000_000
"""What a template may add to its messages."""


def render_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: str, arguments: Mapping[str, Any]
) -> str:
    """The text of `messages` up to where the model's answer begins.

    Raises:
        UserError: the template refuses the messages, fails, runs for more than 20 seconds, or writes far more text
            than it was given.
    """
    came: list[str | BaseException] = []

    def work() -> None:
        try:
            came.append(
                tokenizer.apply_chat_template(
                    list(messages), chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
                )
            )
        except BaseException as error:  # foreign code: whatever it raises is said below
            came.append(error)

    # A loop of the template cannot be stopped, only left behind.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS)
    if not came:
        raise UserError(f"the chat template runs for more than {MOST_SECONDS:.0f} seconds: use another template")
    (text,) = came
    if isinstance(text, BaseException):
        kind = "" if type(text).__module__.startswith("jinja2") else f"{type(text).__name__}: "
        reason = " ".join(str(text).split())[:200]
        raise UserError(f"the chat template refuses this conversation: {kind}{reason}") from text
    if len(text) > MOST_CHARACTERS + sum(len(str(message["content"])) for message in messages):
        raise UserError(f"the chat template writes {len(text)} characters around this conversation: use another one")
    return text


def as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same messages with their content as a list of parts, as templates of multimodal models want it."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def left_out(text: str, messages: Sequence[Message]) -> Message | None:
    """The first system or user message whose content is not in the text; white space around it does not count."""
    told = (message for message in messages if message["role"] in ("system", "user"))
    return next((message for message in told if message["content"].strip() not in text), None)
