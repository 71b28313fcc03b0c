"""What removing a subspace does to prompts of a run, at any strength: an engine's items."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..interventions import Ablate
from ..measures import RefusalTokens, ScoredText, ce_loss
from ..model.points import HookedModel, write_hooks
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.methods import AtStrength
from ..search.methods import CLOSE, STRENGTHS, Curve, crossing_ends
from ..search.passes import Basis
from ..search.removals import RemovalScorer
from ..stats import Rate, mean_interval
from ..text.chat import ChatFormat
from ..values import Value
from .localize import Judged, judged, scorer_of


@dataclass(frozen=True, eq=False, repr=False)
class HeldOut(Value):
    """`{label}/held_out.json`: every prompt at every strength, and at more where the share falls to the target."""

    strengths: tuple[float, ...]
    refused: tuple[tuple[bool, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    kl: tuple[tuple[float, ...], ...]

    @property
    def curve(self) -> Curve:
        """Of as many prompts of each side as there are of both."""
        tables = (torch.tensor(each, dtype=torch.float64) for each in (self.refused, self.kl))
        return Curve(self.strengths, *tables).of_first(min(len(self.refused[0]), len(self.kl[0])))

    def with_more(self, other: "HeldOut") -> "HeldOut":
        """Both, in the order of their strengths."""
        names = ("strengths", "refused", "scores", "kl")
        tables = [zip(*(getattr(each, name) for name in names), strict=True) for each in (self, other)]
        return HeldOut(*zip(*sorted(row for table in tables for row in table), strict=True))

    def at_strengths(self, zero: float) -> tuple[AtStrength, ...]:
        """What the result says of every strength."""
        rows = zip(self.strengths, self.refused, self.scores, self.kl, strict=True)
        return tuple(
            AtStrength(
                strength,
                Rate.of(refused),
                Rate.of([score > zero for score in scores]),
                mean_interval(list(kl)),
                len(kl),
            )
            for strength, refused, scores, kl in rows
        )


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Value):
    """`{label}/answers.json`."""

    refused: tuple[bool, ...]
    degenerate: tuple[bool, ...]
    ce_loss: float


@dataclass(frozen=True, eq=False, repr=False)
class Task(Value):
    """An item of `Removing`: what is measured, of whom, and with what."""

    what: Literal["whole", "refused", "curve", "nearer", "answers", "beside"]
    """A method of what `Removing` starts."""
    label: str
    given: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.label} ({self.what})"


@dataclass(frozen=True, eq=False, repr=False)
class Removing(Value):
    """Prompts of both sides and how they are read; an engine's job."""

    chat: ChatFormat
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    tokens: RefusalTokens
    kl_tokens: int
    pass_rows: int | None
    """Most rows of a pass that scores."""
    batch_size: int
    """Of answers."""
    n_short: int
    """Tokens of the answers that a curve is read from."""
    n_long: int
    texts: tuple[ScoredText, ...] = ()
    """That CE is measured on."""

    @classmethod
    def of(cls, run: RunInputs, part: str, kl_tokens: int, pass_rows: int | None, n_long: int) -> "Removing":
        """Of a part of a run's prompts, without texts."""
        harmful, harmless = (tuple(run.prompts(side, part)) for side in SIDES)
        how = kl_tokens, pass_rows, run.batch_size, run.options.label_tokens, n_long
        return cls(run.chat, harmful, harmless, run.refusal_prefixes, *how)

    def start(self, model: HookedModel) -> Callable[[Task], Any]:
        """Do a task."""
        work = _Removing(self, model)
        return lambda task: getattr(work, task.what)(*task.given)


@dataclass
class _Removing:
    """The tasks, with one copy of the model."""

    job: Removing
    model: HookedModel

    @cached_property
    def scorer(self) -> RemovalScorer:
        job = self.job
        return scorer_of(self.model, job.chat, job.harmful, job.harmless, job.tokens, job.kl_tokens, job.pass_rows)

    def whole(self, bases: Sequence[Any]) -> tuple[Float[Tensor, "basis harmful"], Float[Tensor, "basis harmless"]]:
        """Scores and KL of all prompts under the removal of each basis from all writes, in shared passes."""
        return self._scored(bases, [1.0] * len(bases))

    def refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each harmful prompt, in a short answer."""
        return self._judged((), self.job.n_short).refused

    def curve(self, basis: Basis, plain: tuple[bool, ...], target: float | None) -> HeldOut:
        """At every strength, and at more where the share of refusals falls to a target; None is its own."""
        found = self._at(basis, plain, (0.0, *STRENGTHS))
        return self._halved(found, basis, plain, found.curve.target.item() if target is None else target)

    def nearer(self, found: HeldOut, basis: Basis, plain: tuple[bool, ...], targets: Sequence[float]) -> HeldOut:
        """What was measured, and more strengths where the share of refusals falls to each of the targets."""
        for target in targets:
            found = self._halved(found, basis, plain, target)
        return found

    def answers(self, basis: Basis | None, strength: float) -> Answers:
        """Judged answers to the harmful prompts, and CE on the texts."""
        steps, texts = _steps(basis, strength), list(self.job.texts)
        said = self._judged(steps, self.job.n_long)
        loss = ce_loss(self.model, self.job.chat, texts, interventions=steps)
        return Answers(said.refused, said.degenerate, loss.ce_loss)

    def beside(self, prompts: Sequence[str], basis: Basis | None, strength: float) -> Judged:
        """Judged answers to other prompts."""
        return self._judged(_steps(basis, strength), self.job.n_long, prompts)

    def _halved(self, found: HeldOut, basis: Basis, plain: tuple[bool, ...], target: float) -> HeldOut:
        """With strengths halfway between those around a target, until they are close."""
        while True:
            ends = crossing_ends(found.curve, target)
            if ends is None or ends[1] - ends[0] < CLOSE:
                return found
            found = found.with_more(self._at(basis, plain, [sum(ends) / 2]))

    def _at(self, basis: Basis, plain: tuple[bool, ...], strengths: Sequence[float]) -> HeldOut:
        """Answers, scores and KL."""
        scores, kl = (each.tolist() for each in self._scored([basis] * len(strengths), strengths))
        refused = [
            plain if each == 0 else self._judged([Ablate(basis, each)], self.job.n_short).refused for each in strengths
        ]
        return HeldOut(tuple(strengths), tuple(refused), tuple(map(tuple, scores)), tuple(map(tuple, kl)))

    def _scored(self, bases: Sequence[Any], strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
        scorer, names = self.scorer, write_hooks(self.model.cfg.n_layers)
        weights = [dict.fromkeys(names, each) for each in strengths]
        scores = scorer.score(bases, weights, range(scorer.n_harmful))
        return scores, scorer.kl(bases, weights, range(scorer.n_harmless))

    def _judged(self, steps: Sequence[Ablate], n_tokens: int, prompts: Sequence[str] | None = None) -> Judged:
        job, asked = self.job, self.job.harmful if prompts is None else prompts
        return judged(self.model, job.chat, asked, n_tokens, job.batch_size, None, steps)


def _steps(basis: Basis | None, strength: float) -> list[Ablate]:
    """None: the plain model."""
    return [] if basis is None else [Ablate(basis, strength)]
