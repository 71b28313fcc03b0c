"""What judges of three classes say of a run, as tables of both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..figures.effects import intervention_name
from ..judges.protocol import LABELS
from ..run.answers import UNREAD, SideEffects
from ..stats import Rate


@dataclass(frozen=True)
class ClassRow:
    """One intervention on one side."""

    side: str
    name: str
    rates: tuple[Rate, ...]
    """In the order of the table's labels."""
    score: str
    """The mean grade and its interval; empty where there is none."""


@dataclass(frozen=True)
class ClassTable:
    """One judge; harmful and harmless prompts stand under each other."""

    name: str
    labels: tuple[str, ...]
    rows: tuple[ClassRow, ...]

    @property
    def has_unread(self) -> bool:
        """Whether some verdicts could not be read."""
        return UNREAD in self.labels

    @property
    def has_scores(self) -> bool:
        """Whether the judge grades."""
        return any(row.score for row in self.rows)


def class_tables(sides: Sequence[SideEffects]) -> list[ClassTable]:
    """A table for every judge of three classes that was asked."""
    judges = dict.fromkeys(judge for side in sides for effect in side.effects for judge in effect.classes)
    return [_table(judge, sides) for judge in judges]


def _table(judge: str, sides: Sequence[SideEffects]) -> ClassTable:
    found = [(side, effect) for side in sides for effect in side.effects if judge in effect.classes]
    labels = (*LABELS, *([UNREAD] if any(UNREAD in effect.classes[judge] for _, effect in found) else []))
    rows = []
    for side, effect in found:
        rates = effect.classes[judge]
        shown = tuple(rates.get(label, Rate(0, effect.refusal.n)) for label in labels)
        score = str(effect.scores.get(judge, ""))
        rows.append(ClassRow(side.side, intervention_name(effect.label, side.side), shown, score))
    return ClassTable(judge, labels, tuple(rows))
