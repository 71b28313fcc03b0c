"""The texts that directions are fitted to by gradients: a model's own answers, under a direction that it has."""

from collections.abc import Sequence

from ..directions import Direction
from ..errors import UserError
from ..estimators.rdo import RDOTexts
from ..generation import Generated, generate
from ..interventions import Ablate, Add, Interventions
from ..judges.substring import is_refusal
from ..model.points import HookedModel
from ..text.batches import Span
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts

N_TOKENS = 30
"""Published: of an answer; the plain model's have one less, since the last token of the prompt is read with them."""


def own_texts(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    harmful: Prompts,
    harmless: Prompts,
    *,
    n_tokens: int = N_TOKENS,
    batch_size: int = 32,
) -> RDOTexts:
    """What the model answers to harmful prompts with the direction ablated, to harmless ones with it added, and plain.

    The refusals end with their first full stop, as published. Left out, unlike there: answers that refuse in spite of
    the ablation, harmless prompts that are not refused in spite of the addition, and empty answers. Nothing is written
    anywhere.

    Args:
        direction: such as the chosen difference of means.
        n_tokens: of an answer, at most; greedy.
        batch_size: prompts in a batch; the texts do not depend on it.

    Raises:
        UserError: no answer of a kind is left, a side has no prompts, or one fills the model's context.
    """
    sides = {"harmful": as_prompts(harmful), "harmless": as_prompts(harmless)}

    def spans(side: str, interventions: Interventions, n: int, what: str, refuses: bool | None) -> tuple[Span, ...]:
        if not sides[side]:
            raise UserError(f"own_texts needs {side} prompts")
        prompts = chat.encode_all(sides[side])
        answers = generate(
            model,
            chat,
            sides[side],
            interventions=interventions,
            max_new_tokens=n,
            batch_size=batch_size,
            description=f"answers to {side} prompts, {what}",
        )
        kept = [
            _span(prompt, _sentence(chat, answer) if refuses else answer.token_ids)
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer.token_ids and refuses in (None, is_refusal(answer.text))
        ]
        if not kept:
            raise UserError(
                f"of {len(answers)} answers to {side} prompts, {what}, none {'refuses' if refuses else 'can be used'}: "
                "choose a direction whose ablation and addition work"
            )
        return tuple(kept)

    return RDOTexts(
        spans("harmful", Ablate(direction), n_tokens, "ablated", False),
        spans("harmless", Add(direction), n_tokens, "added", True),
        spans("harmless", (), n_tokens - 1, "plain", None),
    )


def _span(prompt: Sequence[int], answer: Sequence[int]) -> Span:
    return Span((*prompt, *answer), len(prompt), len(prompt) + len(answer))


def _sentence(chat: ChatFormat, answer: Generated) -> tuple[int, ...]:
    """Up to and with the first token that has a full stop in it."""
    ends = (index for index, token in enumerate(answer.token_ids) if "." in chat.tokenizer.decode([token]))
    return answer.token_ids[: next(ends, len(answer.token_ids)) + 1]
