"""How far judges agree: Cohen's κ of every pair, and where the two differ."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..stats import bootstrap_interval
from ..text.given import Prompts, as_prompts
from ..values import Value

N_EXAMPLES, N_WORDS = 3, 6
"""Answers that are shown of every way to differ, and how many of their words."""


@dataclass(frozen=True)
class Kappa:
    """Cohen's κ = (p_o − p_e) / (1 − p_e) with its 95% interval over prompts (BCa bootstrap).

    1 is perfect agreement, 0 what two judges have who guess with their own frequencies. None where it is undefined:
    both say the same single thing throughout; an interval is None where drawn samples leave κ undefined.
    """

    value: float | None
    low: float | None
    high: float | None
    agreed: float
    """p_o: the fraction of answers of which both say the same."""
    n: int
    """Answers of which both have a verdict."""

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined (both say one thing of all {self.n})"
        limits = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{limits}"


@dataclass(frozen=True)
class Difference:
    """An answer of which two judges say different things: what they say, and its first words."""

    first: str
    second: str
    begins: str


@dataclass(frozen=True, eq=False, repr=False)
class Pair(Value):
    """Two judges."""

    first: str
    second: str
    complied: Kappa
    """Of two classes: complied, or not (an evasion is no compliance)."""
    classes: Kappa | None
    """Of refuse, evade and comply; None unless both judges tell them apart."""
    counts: Mapping[str, Mapping[str, int]]
    """Verdict of the first -> of the second -> answers."""
    differences: tuple[Difference, ...]
    """The first few of every kind."""


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Value):
    """Every pair of some judges on the same answers."""

    judges: tuple[str, ...]
    n_answers: int
    n_prompts: int
    """Different ones: answers to one prompt are drawn together for the intervals."""
    unread: Mapping[str, int]
    """Judge -> answers of which its verdict could not be read; they are left out of its pairs."""
    pairs: tuple[Pair, ...]


Verdict = str | bool | None
"""One of the three labels, or whether the model complied; None is unread."""


def agreement(said: Mapping[str, Sequence[Verdict]], prompts: Prompts, responses: Prompts) -> Agreement:
    """Compare the verdicts of every two judges on the same answers.

    Examples:
        >>> said = {"mine": [True, False], "phrases": SubstringJudge()(["Paris.", "I cannot."])}
        >>> agreement(said, ["Where?", "How?"], ["Paris.", "I cannot."]).pairs[0].complied.agreed
        1.0

    Args:
        said: judge -> what it says of every answer, which is what the judge gives as a function of them.
        prompts: one for each answer.

    Raises:
        ValueError: a judge has not one verdict for each answer.
    """
    asked, texts = as_prompts(prompts), as_prompts(responses, "responses")
    if any(len(each) != len(texts) for each in (asked, *said.values())):
        raise ValueError("every judge needs one verdict for each answer, and every answer its prompt")
    pairs = [_pair(first, second, said, asked, texts) for first, second in combinations(said, 2)]
    unread = {name: sum(each is None for each in given) for name, given in said.items()}
    return Agreement(tuple(said), len(texts), len(set(asked)), unread, tuple(pairs))


def cohen_kappa(first: Sequence[Any], second: Sequence[Any], groups: Sequence[Any] | None = None) -> Kappa:
    """Cohen's κ of two judges' labels of the same things.

    Examples:
        >>> str(cohen_kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"]).value)
        '0.5'

    Args:
        groups: things of one group are drawn together for the interval; by default each is its own.

    Raises:
        ValueError: there are no labels, or not as many of both.
    """
    import numpy as np

    if not first or len(first) != len(second):
        raise ValueError("κ needs labels, and as many of both judges")
    labels = sorted({*first, *second}, key=str)
    names = {name: index for index, name in enumerate(dict.fromkeys(range(len(first)) if groups is None else groups))}
    cells = np.zeros((len(labels) ** 2, len(names)))
    for a, b, name in zip(first, second, range(len(first)) if groups is None else groups, strict=True):
        cells[labels.index(a) * len(labels) + labels.index(b), names[name]] += 1
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    if len(labels) == 1:
        return Kappa(None, None, None, agreed, len(first))

    def kappa(*counts: Any) -> Any:
        table = np.stack([each.mean(-1) for each in counts], -1)
        table = table.reshape(*table.shape[:-1], len(labels), len(labels))
        table = table / table.sum((-1, -2), keepdims=True)
        observed = np.trace(table, axis1=-2, axis2=-1)
        expected = (table.sum(-1) * table.sum(-2)).sum(-1)
        return (observed - expected) / (1 - expected)

    value, low, high = bootstrap_interval(*cells.tolist(), statistic=kappa)
    if len(names) == 1 or low != low or high != high:
        return Kappa(value, None, None, agreed, len(first))
    return Kappa(value, low, high, agreed, len(first))


def _pair(
    first: str, second: str, said: Mapping[str, Sequence[Verdict]], prompts: Sequence[str], texts: Sequence[str]
) -> Pair:
    rows = [row for row in zip(said[first], said[second], prompts, texts, strict=True) if None not in row[:2]]
    both = [(a, b) for a, b, *_ in rows if isinstance(a, str) and isinstance(b, str)]
    has_classes = len(both) == len(rows)
    words = [(a, b) if has_classes else (_verdict(a), _verdict(b)) for a, b, *_ in rows]
    asked = [prompt for *_, prompt, _ in rows]
    two = [(_verdict(a), _verdict(b)) for a, b, *_ in rows]
    complied, classes = _kappa(two, asked), _kappa(both, asked) if has_classes else None
    counts: dict[str, dict[str, int]] = {}
    for (a, b), n in sorted(Counter(words).items(), key=str):
        counts.setdefault(str(a), {})[str(b)] = n
    shown: list[Difference] = []
    for (a, b), (*_, text) in zip(words, rows, strict=True):
        if a != b and sum((each.first, each.second) == (a, b) for each in shown) < N_EXAMPLES:
            shown.append(Difference(str(a), str(b), first_words(text)))
    return Pair(first, second, complied, classes, counts, tuple(shown))


def _kappa(pairs: Sequence[tuple[Any, Any]], groups: Sequence[str]) -> Kappa:
    if not pairs:  # none that both could read
        return Kappa(None, None, None, 0.0, 0)
    return cohen_kappa([a for a, _ in pairs], [b for _, b in pairs], groups)


def first_words(text: str) -> str:
    """How an answer begins: enough to find it."""
    words = text.split()
    return " ".join(word[:20] for word in words[:N_WORDS]) + (" …" if len(words) > N_WORDS else "")


def _verdict(said: Verdict) -> str:
    return "complied" if said in (True, "comply") else "not complied"
