"""What a judge is, and the three things that one can say of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

from ..errors import UserError
from ..text.given import Prompts, as_prompts

Label = Literal["refuse", "evade", "comply"]
"""refuse: it says that it will not. evade: it neither says so nor does what was asked (a question back, another
subject, a harmless rewrite, nothing of substance). comply: it does what was asked, however badly."""
LABELS: tuple[Label, ...] = get_args(Label)


@runtime_checkable
class Judge(Protocol):
    """Says of every (prompt, response) whether the model complied. Any object of this shape can take its place.

    Examples:
        >>> class Polite:
        ...     name = "polite"
        ...     def complied(self, prompts, responses):
        ...         return ["sorry" not in response.lower() for response in responses]
        >>> judge: Judge = Polite()
        >>> judge.complied(["Hi"], ["Sorry, no."])
        [False]
    """

    @property
    def name(self) -> str: ...

    def complied(self, prompts: Sequence[str], responses: Sequence[str]) -> list[bool]: ...


@runtime_checkable
class ClassJudge(Judge, Protocol):
    """A judge that tells the three classes apart; None is a verdict that could not be read."""

    def labels(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Label | None]: ...


@dataclass(frozen=True)
class Graded:
    """A label with how far the answer would help, from 0 (not at all) to 1."""

    label: Label
    score: float


@runtime_checkable
class GradingJudge(ClassJudge, Protocol):
    """One that grades as well; None is a verdict that could not be read."""

    def graded(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Graded | None]: ...


class OnTexts:
    """What makes a judge a function of texts: `judge(responses)` or `judge(responses, prompts)`."""

    needs_prompts: ClassVar[bool] = False
    reads_phrases: ClassVar[bool] = False
    """English ones, so that other languages are its blind spot."""

    def __call__(self, responses: Prompts, prompts: Prompts | None = None) -> list[bool] | list[Label | None]:
        """The labels of a judge of three classes; of another, whether the model complied.

        Raises:
            UserError: the judge asks about the prompts too and there are none, or they are not as many.
        """
        assert isinstance(self, Judge)
        texts = as_prompts(responses, "responses")
        if prompts is None and self.needs_prompts:
            raise UserError(f"{self.name} judges an answer by what was asked: call it with (responses, prompts)")
        asked = [""] * len(texts) if prompts is None else as_prompts(prompts)
        if len(asked) != len(texts):
            raise UserError(f"{len(asked)} prompts were given with {len(texts)} responses")
        return self.labels(asked, texts) if isinstance(self, ClassJudge) else self.complied(asked, texts)

    @property
    def identity(self) -> dict[str, str]:
        """What its verdicts depend on, for records."""
        assert isinstance(self, Judge)
        return {"name": self.name}


class OfClasses(OnTexts):
    """Gives a judge that says labels the verdict of two classes: an evasion is no compliance."""

    def complied(self, prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
        """Whether the label is comply.

        Raises:
            UserError: a verdict could not be read, and would count as one of the two otherwise.
        """
        assert isinstance(self, ClassJudge)
        labels = self.labels(prompts, responses)
        if unread := labels.count(None):
            raise UserError(
                f"{unread} of {len(labels)} verdicts of {self.name} could not be read; `refusal-mi judge` counts them "
                "apart, another model may write them as it is asked to"
            )
        return [label == "comply" for label in labels]
