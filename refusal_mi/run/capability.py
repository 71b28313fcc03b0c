"""`capability.json`: what models with and without an intervention answer to the same items of tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_record
from ..harness.tasks import TaskAnswers
from ..model.provenance import ModelRecord
from ..stats import Paired, Rate, holm, mean_interval
from ..text.chat import ChatRecord
from ..values import Value, frame

FILE = "capability.json"
NATS_PER_BYTE = "nats per byte"
SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are 0 where a model can do nothing."""
ROUNDING = 1e-4
"""Metrics that differ less are the same: what float32 leaves of equal texts."""


@dataclass(frozen=True, eq=False, repr=False)
class VariantAnswers(Value):
    """One model under one intervention."""

    label: str
    """plain, ablated, random 0, ..., exported."""
    model: ModelRecord
    interventions: str
    """In words; "none"."""
    tasks: tuple[TaskAnswers, ...]


@dataclass(frozen=True, eq=False, repr=False)
class TaskEffect(Value):
    """A task before and after, paired item by item."""

    task: str
    filter: str
    metric: str
    variant: str
    n: int
    is_choice: bool
    chance: float | None
    """The share that is right by guessing."""
    before: tuple[float, float | None, float | None]
    """Mean of the plain model and its 95% interval: Wilson's where each item is right or wrong, else Student's t.

    None, None: one item, of which Student's t says nothing."""
    after: tuple[float, float | None, float | None]
    change: tuple[float, float | None, float | None]
    """After minus before, paired: Newcombe's interval where each item is right or wrong, else Student's t."""
    p: float | None
    """McNemar's exact test where each item is right or wrong, else the paired t test, which one item has not."""
    p_holm: float | None
    """Over the tasks of this variant."""
    unanswered_before: Rate
    """Where the task's filter finds no answer, such as no number; neither right nor merely wrong."""
    unanswered_after: Rate
    unanswered_change: Mapping[str, float | int]
    """Paired: difference, interval, McNemar's p."""
    same_answers: Rate
    """Items that both answer alike: the same choice or text found, and a metric that differs by `ROUNDING` at most."""
    largest_nats: float | None
    """Largest difference of ln p of a choice; None where text is written."""

    @property
    def guess(self) -> float | None:
        """What the metric is where a model knows nothing; None where that is not known."""
        if self.metric == NATS_PER_BYTE:
            return math.log(256)
        return 0.0 if self.metric in SHARES and not self.is_choice else self.chance

    @property
    def says_something(self) -> bool | None:
        """Whether the plain model is better than a guess: where not, nothing can be lost. None: not known."""
        mean, low, high = self.before
        if self.guess is None:
            return None
        if self.metric == NATS_PER_BYTE:
            return (mean if high is None else high) < self.guess
        return (mean if low is None or not self.guess else low) > self.guess

    @property
    def caveat(self) -> str | None:
        """Why a change says nothing, in words; None where it can say something."""
        if self.says_something is None:
            return f"what a model scores that knows nothing is not known for {self.metric}: nor whether it can be lost"
        if self.says_something:
            return None
        mean, low, high = self.before
        is_nats = self.metric == NATS_PER_BYTE
        end = "" if low is None or high is None else f", 95% to {high:.3f}" if is_nats else f", 95% from {low:.3f}"
        level = f"chance ({self.guess:.3f})" if self.guess else "zero"
        place = f"below guesses of bytes ({self.guess:.3f})" if is_nats else f"above {level}"
        return f"the plain model ({mean:.3f}{end}) is not {place}: nothing can be lost"


@dataclass(frozen=True, eq=False, repr=False)
class CapabilityResult(Value):
    """`capability.json`."""

    tasks: tuple[str, ...]
    limit: int | None
    chat: ChatRecord | None
    """The chat template, where questions went through it."""
    versions: Mapping[str, str]
    variants: tuple[VariantAnswers, ...]
    """The plain model first."""
    effects: tuple[TaskEffect, ...]
    """Of every other variant against the plain model."""
    same_as_hooked: tuple[TaskEffect, ...] = ()
    """Of the exported model against the hooked one, which it should equal."""

    @classmethod
    def load(cls, path: str | Path) -> "CapabilityResult":
        """Read `capability.json`, or the one in this folder."""
        path = Path(path)
        return read_record(path / FILE if path.is_dir() else path, cls)

    def variant(self, label: str) -> VariantAnswers:
        """One variant's answers, such as of "ablated"."""
        return next(each for each in self.variants if each.label == label)

    def effect(self, task: str, variant: str, filter: str | None = None) -> TaskEffect:
        """What a variant does to a task; of a task with several filters the first, or the one named."""
        return next(
            each
            for each in self.effects
            if (each.task, each.variant) == (task, variant) and filter in (None, each.filter)
        )

    def to_frame(self) -> Any:
        """A pandas table with a row for each task, filter and variant."""
        return frame(
            [
                {"task": each.task, "filter": each.filter, "metric": each.metric, "variant": each.variant, "n": each.n}
                | {"before": each.before[0], "after": each.after[0], "change": each.change[0]}
                | {"low": each.change[1], "high": each.change[2], "p_holm": each.p_holm}
                for each in self.effects
            ]
        )


def effects_of(before: VariantAnswers, after: VariantAnswers) -> tuple[TaskEffect, ...]:
    """Every task of two variants, paired; p-values adjusted by Holm over the tasks.

    Raises:
        UserError: the two did not answer the same questions.
    """
    found = [_effect(one, other, after.label) for one, other in zip(before.tasks, after.tasks, strict=True)]
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    return tuple(each if each.p is None else replace(each, p_holm=next(adjusted)) for each in found)


def _effect(before: TaskAnswers, after: TaskAnswers, label: str) -> TaskEffect:
    asked = [[(item.task, item.doc, item.prompt) for item in each.items] for each in (before, after)]
    if asked[0] != asked[1] or (before.task, before.filter, before.metric) != (after.task, after.filter, after.metric):
        raise UserError(f"{before.task}: {label} was not asked the same questions as the plain model; make it again")
    is_binary = before.is_right_or_wrong and after.is_right_or_wrong
    unanswered = [[not item.is_answered for item in each.items] for each in (before, after)]
    (mean_before, mean_after), change, p = (_flags if is_binary else _numbers)(before.values, after.values)
    same = [
        one.answer == other.answer and abs(one.values[before.metric] - other.values[before.metric]) <= ROUNDING
        for one, other in zip(before.items, after.items, strict=True)
    ]
    nats = [
        abs(a - b)
        for one, other in zip(before.items, after.items, strict=True)
        for a, b in zip(one.nats, other.nats, strict=True)
    ]
    return TaskEffect(
        before.task,
        before.filter,
        before.metric,
        label,
        len(before.items),
        before.is_choice,
        before.chance if is_binary else None,
        mean_before,
        mean_after,
        change,
        p,
        p,
        Rate.of(unanswered[0]),
        Rate.of(unanswered[1]),
        Paired.of(*unanswered).describe(),
        Rate.of(same),
        max(nats) if nats else None,
    )


_Interval = tuple[float, float | None, float | None]
_Compared = tuple[tuple[_Interval, _Interval], _Interval, float | None]


def _flags(before: Sequence[float], after: Sequence[float]) -> _Compared:
    flags = [[value == 1 for value in each] for each in (before, after)]
    rates, paired = [Rate.of(each) for each in flags], Paired.of(*flags)
    one, other = ((rate.value, *rate.interval) for rate in rates)
    return (one, other), (paired.difference, *paired.interval), paired.p_value


def _numbers(before: Sequence[float], after: Sequence[float]) -> _Compared:
    from scipy.stats import ttest_1samp

    changes = [b - a for a, b in zip(before, after, strict=True)]
    if len(changes) == 1:
        return ((before[0], None, None), (after[0], None, None)), (changes[0], None, None), None
    p = 0.0 if any(changes) else 1.0  # the t of equal changes is infinite
    if len(set(changes)) > 1:
        p = float(ttest_1samp(changes, 0).pvalue)
    return (mean_interval(before), mean_interval(after)), mean_interval(changes), p
