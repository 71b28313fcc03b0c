"""What an intervention does on validation prompts: scores, short answers, CE loss; one arm is an engine's item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from ..generation import Generated, generate
from ..interventions import Intervention
from ..judges.substring import SubstringJudge
from ..measures import (
    LossResult,
    RefusalTokens,
    ScoredText,
    TextLoss,
    kl_nats,
    next_token_logits,
    refusal_scores,
    text_losses,
)
from ..model.points import HookedModel
from ..run.answers import Completion
from ..run.combos import ValidationRow
from ..run.options import RunOptions
from ..stats import mean_interval
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..values import Value
from .context import Result, loss_batch
from .effects import evaluate


@dataclass(frozen=True, eq=False, repr=False)
class Arm(Value):
    """An intervention under its label; an item of `Validating`."""

    label: str
    interventions: tuple[Intervention, ...] = ()

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False, repr=False)
class Validating(Value):
    """An engine's job: rows of `combos.json`."""

    chat: ChatFormat
    options: RunOptions
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    tokens: RefusalTokens
    texts: Mapping[str, tuple[ScoredText, ...]]
    val_new_tokens: int

    def start(self, model: HookedModel) -> Callable[[Arm], ValidationRow]:
        """Measure an arm."""
        return _Validation(self, model).row


@dataclass
class _Validation:
    """One copy of the model, and what the plain one gives."""

    job: Validating
    model: HookedModel

    def row(self, arm: Arm) -> ValidationRow:
        job, how = self.job, arm.interventions
        scores = self._batched(
            lambda size: refusal_scores(
                self.model, job.chat, job.harmful, job.tokens, interventions=how, batch_size=size
            )
        )
        mean, low, high = mean_interval(scores.tolist())
        verdicts = evaluate(self._answers(arm), SubstringJudge())
        return ValidationRow(
            arm.label,
            mean,
            (low, high),
            kl_nats(self.plain, self._logits(how), job.options.kl_formula).mean().item(),
            verdicts.refusal,
            verdicts.degenerate,
            {name: self._loss(name, how) for name in job.texts},
            job.options.quick,
        )

    @cached_property
    def plain(self) -> Float[Tensor, "harmless d_vocab"]:
        return self._logits(())

    @cached_property
    def plain_losses(self) -> dict[str, list[TextLoss]]:
        return {name: self._text_losses(texts, ()) for name, texts in self.job.texts.items()}

    def _batched(self, work: Callable[[int], Result]) -> Result:
        return with_smaller_batches(work, self.job.options.batch_size)

    def _logits(self, interventions: Sequence[Intervention]) -> Float[Tensor, "harmless d_vocab"]:
        chat, prompts = self.job.chat, self.job.harmless
        return self._batched(
            lambda size: next_token_logits(self.model, chat, prompts, interventions=interventions, batch_size=size)
        )

    def _answers(self, arm: Arm) -> list[Completion]:
        job = self.job

        def answer(batch_size: int) -> list[Generated]:
            return generate(
                self.model,
                job.chat,
                job.harmful,
                interventions=arm.interventions,
                max_new_tokens=job.val_new_tokens,
                batch_size=batch_size,
                description=f"validation, {arm.label}",
            )

        pairs = zip(job.harmful, self._batched(answer), strict=True)
        return [Completion(None, prompt, answered.text) for prompt, answered in pairs]

    def _loss(self, name: str, interventions: Sequence[Intervention]) -> LossResult:
        plain = self.plain_losses[name]
        if not interventions:
            return LossResult.of(plain)
        return LossResult.of(self._text_losses(self.job.texts[name], interventions), plain)

    def _text_losses(self, texts: Sequence[ScoredText], interventions: Sequence[Intervention]) -> list[TextLoss]:
        chat, options = self.job.chat, self.job.options
        return self._batched(
            lambda size: text_losses(
                self.model, chat, texts, interventions=interventions, batch_size=loss_batch(options, size)
            )
        )
