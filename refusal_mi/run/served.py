"""Answers of a server: what a run folder says of them beside the files that every answer has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import as_json, read_record, sha256_json
from ..text.chat import ChatRecord
from ..values import Value
from .answers import Side

Api = Literal["chat", "completions"]
"""What is sent: messages, or the rendered prompt."""
FOLDER = "served"
MAX_LABEL = 64
"""Characters: it stands in names of files, beside that of a set."""


@dataclass(frozen=True, eq=False, repr=False)
class ServedSet(Value):
    """The answers to the prompts of one side."""

    set_name: str
    n: int
    """Prompts that were answered."""
    n_truncated: int
    """Of them, answers that the limit of tokens cut off."""
    unanswered: Mapping[str, str] = field(default_factory=dict)
    """Prompt -> how it failed the last time."""
    same_text: Mapping[str, int] = field(default_factory=dict)
    """Intervention of the run -> how many of these answers are, letter for letter, what it answered to that prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class ServedRecord(Value):
    """`served/{label}.json`: who was asked, and how."""

    label: str
    """As in `completions/{set}_{label}_completions.json`."""
    endpoint: str
    """Without any key."""
    model: str
    """What was asked for."""
    answered_by: tuple[str, ...]
    """What the answers call their model."""
    api: Api
    options: Mapping[str, Any]
    """What was sent beside model and prompt."""
    sets: Mapping[Side, ServedSet]
    asked_sha256: str = ""
    """Of the system message and the template that the run had then."""

    @property
    def unanswered(self) -> dict[str, str]:
        """Of both sides."""
        return {prompt: problem for each in self.sets.values() for prompt, problem in each.unanswered.items()}


def record_file(label: str) -> str:
    """Where the record of a label lies in its run folder."""
    return f"{FOLDER}/{label}.json"


def has_record(folder: Path, label: str) -> bool:
    """Whether a server gave the answers of this label."""
    return (folder / record_file(label)).is_file()


def is_served(folder: Path, label: str, system: str | None, chat: ChatRecord, max_new_tokens: int) -> bool:
    """Whether a server gave the answers of this label, asked as the run asked: they stand beside the run's own."""
    if not has_record(folder, label):
        return False
    record = read_record(folder / record_file(label), ServedRecord)
    return record.asked_sha256 == asked_sha256(system, chat) and record.options.get("max_tokens") == max_new_tokens


def asked_sha256(system: str | None, chat: ChatRecord) -> str:
    """Of what a run says to the model beside the prompts."""
    held = (chat.template_sha256, system, chat.template_kwargs, chat.template_date, chat.response_prefix)
    return sha256_json(as_json(held))


def check_label(label: str) -> None:
    """Make sure that a label can stand in file names, and is none of the run's own.

    Raises:
        UserError: it cannot, or it is.
    """
    if not label or not re.fullmatch(r"[A-Za-z0-9.-]+", label) or label.startswith("."):
        raise UserError(f"--label takes letters, digits, - and ., not {label!r}")
    if len(label) > MAX_LABEL:
        raise UserError(f"--label takes up to {MAX_LABEL} characters, not {len(label)}")
    if label in ("baseline", "ablation", "actadd") or label.startswith("random"):
        raise UserError(f"--label {label}: answers of that name are the run's own; choose another, such as served")
