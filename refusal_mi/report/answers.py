"""Completions side by side, judged, within a budget of bytes."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..figures.effects import intervention_name
from ..run.answers import SideEffects
from ..run.folder import RunRecord
from ..terminal import is_shown

MAX_CHARACTERS = 6_000
"""Longer answers are cut, visibly."""
MAX_BYTES_PER_SIDE = 1_800_000
"""Later prompts are left out, and the page says how many: plotly takes half of the 10 MB."""
_ORDER = {"harmful": ("baseline", "ablation", "actadd"), "harmless": ("baseline", "actadd", "ablation")}


@dataclass(frozen=True)
class Answer:
    """One answer and what the judge said."""

    label: str
    name: str
    text: str
    is_refused: bool
    is_degenerate: bool


@dataclass(frozen=True)
class AnswerRow:
    """One prompt with its answers under each intervention."""

    prompt: str
    category: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class AnswerTable:
    """The rows that are shown, and how many are not."""

    side: SideEffects
    columns: tuple[tuple[str, str], ...]
    """(label, name)"""
    rows: tuple[AnswerRow, ...]
    n_left_out: int


def answer_tables(record: RunRecord) -> list[AnswerTable]:
    """One table for each side that has answers."""
    return [_table(record, side) for side in record.sides]


def visible(text: str) -> str:
    """Text with its control characters as their pictures, so that a broken answer looks broken.

    What would reorder the text around it, or is half of a character, is replaced.
    """
    return text if text.isprintable() and text.isascii() else "".join(c if is_shown(c) else _picture(c) for c in text)


def _table(record: RunRecord, side: SideEffects) -> AnswerTable:
    served = [effect.label for effect in side.effects if record.is_served(effect.label)]
    labels = [label for label in (*_ORDER[side.side], *served) if side.find(label) is not None]
    columns = tuple((label, intervention_name(label, side.side)) for label in labels)
    answered = [record.answers(side, label) for label in labels]
    rows: list[AnswerRow] = []
    size, total = 0, len(answered[0]) if answered else 0
    for lines in zip(*answered, strict=True):
        answers = tuple(
            Answer(
                label,
                name,
                _shortened(visible(line.response)),
                is_refused=line.is_refused,
                is_degenerate=line.is_degenerate,
            )
            for (label, name), line in zip(columns, lines, strict=True)
        )
        row = AnswerRow(visible(lines[0].prompt), lines[0].category or "", answers)
        size += _bytes([row.prompt, *(answer.text for answer in answers)])
        if size > MAX_BYTES_PER_SIDE:
            break
        rows.append(row)
    return AnswerTable(side, columns, tuple(rows), total - len(rows))


def _picture(c: str) -> str:
    if unicodedata.category(c) != "Cc":
        return "�"
    return chr(0x2400 + ord(c)) if ord(c) < 32 else "␡"


def _shortened(text: str) -> str:
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} … [{left_out:,} more characters]"


def _bytes(texts: Sequence[str]) -> int:
    """Size on the page: markup around each text, and its special characters as entities."""
    return sum(len(text.encode()) + 4 * sum(text.count(c) for c in "&<>\"'") + 400 for text in texts)
