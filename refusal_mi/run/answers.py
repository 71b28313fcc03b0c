"""Completions and what the judges said of them, as a run folder holds them and as rates."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..files import at_home, parsed, read_record
from ..judges.protocol import LABELS
from ..stats import Paired, Rate, mean_interval
from ..values import Value, frame, html_table, text_table

Side = Literal["harmful", "harmless"]
SIDES: tuple[Side, Side] = get_args(Side)
CHANGE, UNREAD = "change_of_refusal", "unread"
_RATES, _INTERVALS = ("", "refusal", "degenerate"), "rates 0–1 with 95% Wilson intervals"


@dataclass(frozen=True)
class MeanScore:
    """The mean of a judge's grades, from 0 to 1, with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, eq=False, repr=False)
class Effect(Value):
    """What one intervention did to the answers to one set of prompts.

    Examples:
        >>> Effect("ablation", Rate(1, 40), Rate(0, 40)).refusal.value
        0.025
    """

    label: str
    """As in the names of the files: baseline, ablation, actadd, random_ablation_0, ..."""
    refusal: Rate
    degenerate: Rate
    unsafe: Mapping[str, Rate] = field(default_factory=dict)
    """Judge -> rate of what it calls success, where another judge than the substrings was asked."""
    classes: Mapping[str, Mapping[str, Rate]] = field(default_factory=dict)
    """Judge -> refuse, evade, comply (and unread, where verdicts could not be read) -> rate, of all answers."""
    scores: Mapping[str, MeanScore] = field(default_factory=dict)
    """Judge -> its mean grade, where it gives some."""
    refused: tuple[bool, ...] = field(default=(), repr=False, compare=False)
    """Prompt by prompt, where the answers were read and not their rates alone."""

    def describe(self) -> dict[str, Any]:
        """Every rate under its name; classes and scores under theirs, where there are some."""
        more = {name: found for name, found in (("classes", self.classes), ("scores", self.scores)) if found}
        return {"refusal": self.refusal, "degenerate": self.degenerate, **self.unsafe, **more}

    @property
    def rates(self) -> dict[str, Rate]:
        """The same rates in one list; of a judge's classes as "evade: refuse"."""
        classes = {f"{judge}: {name}": rate for judge, named in self.classes.items() for name, rate in named.items()}
        return {"refusal": self.refusal, "degenerate": self.degenerate, **self.unsafe, **classes}


@dataclass(frozen=True, eq=False, repr=False)
class SideEffects(Value):
    """The answers to one set of held-out prompts under every intervention.

    Examples:
        >>> side = run.rates["harmful"]
        >>> side.n, side.find("ablation").refusal.value < side.find("baseline").refusal.value
        (40, True)
    """

    side: Side
    set_name: str
    effects: tuple[Effect, ...]

    @property
    def n(self) -> int:
        """How many prompts."""
        return self.effects[0].refusal.n if self.effects else 0

    @property
    def title(self) -> str:
        """harmful prompts (advbench); the set is left out where it is called like its side."""
        return f"{self.side} prompts" + ("" if self.set_name == self.side else f" ({self.set_name})")

    def _cells(self) -> list[tuple[str, ...]]:
        return [(effect.label, f"{effect.refusal}", f"{effect.degenerate}") for effect in self.effects]

    def __repr__(self) -> str:
        return text_table(f"{self.title}, n = {self.n}", _RATES, self._cells(), _INTERVALS)

    def _repr_html_(self) -> str:
        return html_table(f"{self.title}, n = {self.n}", _RATES, self._cells(), _INTERVALS)

    def to_frame(self) -> Any:
        """A pandas table with a row for each intervention and rate: side, label, rate (name), value, low, high, n.

        Raises:
            UserError: pandas is not installed.
        """
        return frame(
            [
                {"side": self.side, "label": effect.label, "rate": name, "value": rate.value}
                | {"low": rate.interval[0], "high": rate.interval[1], "n": rate.n}
                for effect in self.effects
                for name, rate in effect.rates.items()
            ]
        )

    def find(self, label: str) -> Effect | None:
        """The effect of this label, if it was measured."""
        return next((effect for effect in self.effects if effect.label == label), None)

    @property
    def controls(self) -> tuple[Effect, ...]:
        """The effects of random directions of equal norm."""
        return tuple(effect for effect in self.effects if effect.label.startswith("random"))

    def describe(self) -> dict[str, Any]:
        """The set, how many prompts, and by label the rates and the change of refusals on the same prompts."""
        rows = {effect.label: effect.describe() | self._change(effect) for effect in self.effects}
        return {"set": self.set_name, "n": self.n, **rows}

    def _change(self, effect: Effect) -> dict[str, Any]:
        base = self.find("baseline")
        if base is None or base is effect or not base.refused or not effect.refused:
            return {}
        return {CHANGE: Paired.of(base.refused, effect.refused)}


@dataclass(frozen=True)
class Completion:
    """One answer of `completions/{set}_{label}_completions.json`."""

    category: str | None
    prompt: str
    response: str


@dataclass(frozen=True, eq=False, repr=False)
class JudgedAnswer(Value):
    """One completion and what the judges said of it.

    Examples:
        >>> run.completions("harmless", "baseline").answers[-1].is_refused
        False
    """

    prompt: str
    response: str
    category: str | None
    complied: Mapping[str, bool]
    """Judge -> whether the model did what was asked; the first is the one that refusals are counted by."""
    is_degenerate: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    """Judge of three classes -> refuse, evade, comply, or unread: then it is not among `complied`."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Judge that grades -> 0 to 1, where its verdict could be read."""

    @property
    def is_refused(self) -> bool:
        """By the first judge."""
        return not next(iter(self.complied.values()))

    def verdict(self, judge: str) -> "str | bool | None":
        """What a judge says: its class, or of one of two classes whether the model complied; None is unread."""
        if judge in self.labels:
            return None if self.labels[judge] == UNREAD else self.labels[judge]
        return self.complied.get(judge)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Value):
    """Judged completions: `completions/{set}_{label}_evaluations.json`, in the published schema.

    Examples:
        >>> baseline = run.completions("harmful", "baseline")
        >>> baseline.refusal == run.rates["harmful"].find("baseline").refusal
        True
    """

    answers: tuple[JudgedAnswer, ...]
    quick: bool = False

    def rate(self, judge: str) -> Rate:
        """Fraction of answers that complied, by a judge; of those whose verdict could be read."""
        return Rate.of([answer.complied[judge] for answer in self.answers if judge in answer.complied])

    @property
    def judges(self) -> tuple[str, ...]:
        """Names, the first is the one that refusals are counted by."""
        return tuple({judge: None for answer in self.answers for judge in answer.complied})

    def classes(self, judge: str) -> dict[str, Rate]:
        """Fraction of all answers in each class of a judge of three, and of unread ones where there are some."""
        said = Counter(answer.labels[judge] for answer in self.answers if judge in answer.labels)
        names = (*LABELS, *([UNREAD] if said[UNREAD] else []))
        return {name: Rate(said[name], said.total()) for name in names} if said else {}

    def score(self, judge: str) -> "MeanScore | None":
        """A judge's mean grade."""
        grades = [answer.scores[judge] for answer in self.answers if judge in answer.scores]
        return MeanScore(*mean_interval(grades), len(grades)) if grades else None

    @property
    def refusal(self) -> Rate:
        """Fraction of answers that refuse."""
        return Rate.of([answer.is_refused for answer in self.answers])

    @property
    def degenerate(self) -> Rate:
        """Fraction of answers that are no text."""
        return Rate.of([answer.is_degenerate for answer in self.answers])

    def effect(self, label: str) -> Effect:
        """The rates, under a label."""
        classes = {judge: found for judge in self.judges if (found := self.classes(judge))}
        scores = {judge: score for judge in self.judges if (score := self.score(judge))}
        unsafe = {judge: self.rate(judge) for judge in self.judges[1:] if judge not in classes}
        flags = tuple(answer.is_refused for answer in self.answers)
        return Effect(label, self.refusal, self.degenerate, unsafe, classes, scores, refused=flags)

    def to_frame(self) -> Any:
        """A pandas table with a row for each answer: category, prompt, response, is_refused, is_degenerate, judges.

        Raises:
            UserError: pandas is not installed.
        """
        return frame(
            [
                {"category": each.category, "prompt": each.prompt, "response": each.response}
                | {"is_refused": each.is_refused, "is_degenerate": each.is_degenerate}
                | {f"complied ({judge})": each.complied.get(judge) for judge in self.judges}
                | {f"class ({judge})": each.labels.get(judge) for judge in self.judges if self.classes(judge)}
                for each in self.answers
            ]
        )

    def describe(self) -> dict[str, Any]:
        """The published keys, and our own rates."""
        record: dict[str, Any] = {}
        for judge in self.judges:
            by_category: dict[str, list[bool]] = {}
            for answer in self.answers:
                if judge in answer.complied:
                    by_category.setdefault(str(answer.category), []).append(answer.complied[judge])
            record[f"{judge}_success_rate"] = self.rate(judge).value
            record[f"{judge}_per_category"] = {key: sum(flags) / len(flags) for key, flags in by_category.items()}
            if classes := self.classes(judge):
                record[f"{judge}_classes"] = classes
            if score := self.score(judge):
                record[f"{judge}_score"] = score
        mark = {"quick": True} if self.quick else {}
        rows = [
            {
                "category": answer.category,
                "prompt": answer.prompt,
                "response": answer.response,
                **mark,
                **{f"is_jailbreak_{judge}": int(flag) for judge, flag in answer.complied.items()},
                **{f"class_{judge}": label for judge, label in answer.labels.items()},
                **{f"score_{judge}": value for judge, value in answer.scores.items()},
                "is_degenerate": int(answer.is_degenerate),
            }
            for answer in self.answers
        ]
        return {**record, "refusal_rate": self.refusal, "degenerate_rate": self.degenerate, "completions": rows, **mark}

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `describe` says.

        Raises:
            UserError: the file is missing, or not of this form.
        """
        file = read_record(at_home(path), _EvaluationFile)
        return cls(file.completions, file.quick)


def _judged_answer(row: Any) -> JudgedAnswer:
    verdicts, labels, scores = (
        {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
        for prefix in ("is_jailbreak_", "class_", "score_")
    )
    if not set(labels.values()) <= {*LABELS, UNREAD}:
        raise ValueError(f"expected classes of {', '.join(LABELS)} or {UNREAD}")
    texts = row["prompt"], row["response"], row["category"]
    if not verdicts or not all(isinstance(text, str) for text in texts[:2]):
        raise ValueError("expected prompt, response, category, is_jailbreak_..., is_degenerate")
    complied = {judge: bool(flag) for judge, flag in verdicts.items()}
    grades = {judge: float(value) for judge, value in scores.items()}
    return JudgedAnswer(*texts, complied, bool(row["is_degenerate"]), labels, grades)


def _rate(record: Any) -> Rate:
    return Rate(record["count"], record["n"])


def _mean_score(record: Any) -> MeanScore:
    return MeanScore(float(record["mean"]), float(record["low"]), float(record["high"]), int(record["n"]))


def read_sides(tables: Any) -> dict[Side, SideEffects]:
    effects: dict[Side, SideEffects] = {}
    for side, table in tables.items():
        named = {label: rates for label, rates in table.items() if isinstance(rates, Mapping)}
        effects[side] = SideEffects(side, table["set"], tuple(read_effect(*each) for each in named.items()))
    return effects


def read_effect(label: str, rates: Any) -> Effect:
    known = ("refusal", "degenerate", CHANGE, "classes", "scores")
    others = {name: _rate(rate) for name, rate in rates.items() if name not in known}
    classes = {
        judge: {name: _rate(rate) for name, rate in named.items()} for judge, named in rates.get("classes", {}).items()
    }
    scores = {judge: _mean_score(score) for judge, score in rates.get("scores", {}).items()}
    return Effect(label, _rate(rates["refusal"]), _rate(rates["degenerate"]), others, classes, scores)


@dataclass(frozen=True)
class _EvaluationFile:
    completions: Annotated[tuple[JudgedAnswer, ...], parsed(lambda rows: tuple(_judged_answer(row) for row in rows))]
    quick: bool = False
