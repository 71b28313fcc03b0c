"""Judges by name: what `--judge` and `--judges` take."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from ..errors import UserError
from .classifier import ClassifierJudge, read_labels
from .evade import EvadeJudge
from .http import LLAMA_GUARD, LLAMA_GUARD_MODEL, REFUSAL, TOGETHER, HttpJudge, Rubric
from .protocol import ClassJudge, Judge
from .strongreject import asking
from .substring import SubstringJudge


@dataclass(frozen=True)
class _Asked:
    """What stands behind a name, and the options beside it."""

    where: str
    model: str | None
    labels: str | None

    def endpoint(self, url: str, rubric: Rubric) -> HttpJudge:
        return HttpJudge(url, self.model or LLAMA_GUARD_MODEL, rubric)


JUDGES: Mapping[str, Callable[[_Asked], Judge]] = {
    "substring": lambda asked: SubstringJudge(),
    "evade": lambda asked: EvadeJudge(),
    "llamaguard": lambda asked: asked.endpoint(asked.where or TOGETHER, LLAMA_GUARD),
    "refusal": lambda asked: asked.endpoint(asked.where, REFUSAL),
    "strongreject": lambda asked: asking(asked.where, asked.endpoint),
    "classifier": lambda asked: ClassifierJudge(asked.where, read_labels(asked.labels)),
}
"""Name -> judge; the one place to add another."""
_ALONE, _NEEDS = ("substring", "evade"), {"refusal": "URL", "strongreject": "URL|MODEL", "classifier": "MODEL"}
USAGE = ", ".join(name if name not in _NEEDS else f"{name}:{_NEEDS[name]}" for name in JUDGES)


def judge_named(
    spec: str,
    *,
    model: str | None = None,
    labels: str | None = None,
    question: Literal["harm", "refusal"] = "harm",
) -> Judge:
    """The judge of a name: "substring", "evade", "llamaguard" (on Together), or the address of an endpoint.

    Or, with an address or a model: "llamaguard:URL", "refusal:URL", "strongreject:URL", "strongreject:MODEL" and
    "classifier:MODEL", where MODEL is a directory or hub id.

    Examples:
        >>> judge_named("evade")(["I won't help with that.", "Could you tell me more?", "Paris."])
        ['refuse', 'evade', 'comply']

    Args:
        model: what an endpoint is asked for; default LlamaGuard 2.
        labels: what the labels of a classifier mean, as in "LABEL_0=comply,LABEL_1=refuse".
        question: of an address alone: "harm" asks LlamaGuard's and fills `llamaguard2_*`; "refusal" asks whether the
            model refused.

    Raises:
        UserError: the name is none of these, or the address carries a key.
    """
    name, _, where = spec.partition(":")
    if where.startswith("//"):
        name, where = ("refusal" if question == "refusal" else "llamaguard"), spec
    if name not in JUDGES or (where and name in _ALONE):
        near = get_close_matches(name.lower(), list(JUDGES), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
        raise UserError(f"--judge takes {USAGE} or the http(s) address of an endpoint, not {spec!r}{hint}")
    if not where and name in _NEEDS:
        raise UserError(f"--judge {name} needs to know whom to ask: {name}:{_NEEDS[name]}")
    kind = _kind(spec)
    if model is not None and not kind.takes_model:
        raise UserError("--judge-model needs --judge llamaguard or an address")
    if name == "strongreject" and kind.takes_model and model is None:
        raise UserError("--judge strongreject:URL needs --judge-model: the name of the chat model to ask there")
    if labels is not None and not kind.takes_labels:
        raise UserError("--judge-labels needs --judge classifier:MODEL")
    return JUDGES[name](_Asked(where, model, labels))


def judges_named(specs: str, *, model: str | None = None, labels: str | None = None) -> list[Judge]:
    """At least two judges, separated by commas; the options are those of the judges that take them.

    Raises:
        UserError: a name is none, there is one alone, two have one name, or an option is none of any of them.
    """
    names = [each.strip() for each in specs.split(",")]
    if len(names) < 2:
        raise UserError(f"--judges takes at least two names with commas between them, not {specs!r}; one is --judge")
    kinds = [_kind(name) for name in names]
    for option, value, users in (("model", model, "an endpoint"), ("labels", labels, "a classifier")):
        if value is not None and not any(getattr(kind, f"takes_{option}") for kind in kinds):
            raise UserError(f"--judge-{option} needs {users} among the judges")
    found = [
        judge_named(name, model=model if kind.takes_model else None, labels=labels if kind.takes_labels else None)
        for name, kind in zip(names, kinds, strict=True)
    ]
    twice = [name for name, n in Counter(judge.name for judge in found).items() if n > 1]
    if twice:
        raise UserError(f"two of the judges {specs} are called {twice[0]}: compare them one after the other")
    return found


@dataclass(frozen=True)
class _Kind:
    """Which options a name goes with."""

    takes_model: bool
    takes_labels: bool


def _kind(spec: str) -> _Kind:
    name = spec.partition(":")[0]
    return _Kind(name in ("llamaguard", "refusal") or "://" in spec, name == "classifier")


def identify(judge: Judge) -> dict[str, str]:
    """What a judge's verdicts depend on, for records: its name, and its endpoint, model and labels."""
    found = getattr(judge, "identity", None)
    return found if isinstance(found, dict) else {"name": judge.name}


def check_says_refusal(judge: Judge) -> None:
    """A judge of harm finds every answer to a harmless request safe, which is no refusal.

    Raises:
        UserError: the judge is LlamaGuard's question.
    """
    if judge.name == LLAMA_GUARD.name:
        raise UserError(
            f"--judge: {judge.name} says what is harmful, not what is refused, and would take every harmless answer "
            "for a refusal; use refusal:URL, evade, strongreject or classifier:MODEL"
        )


def refused(judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """Whether every answer refuses: by its label where the judge tells evasions apart, else where it did not comply.

    Raises:
        UserError: the judge is one of harm, or a verdict could not be read.
    """
    check_says_refusal(judge)
    if not isinstance(judge, ClassJudge):
        return [not each for each in judge.complied(prompts, responses)]
    labels = judge.labels(prompts, responses)
    if unread := labels.count(None):
        raise UserError(f"{unread} of {len(labels)} verdicts of {judge.name} could not be read")
    return [label == "refuse" for label in labels]
