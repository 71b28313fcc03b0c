"""CAA's open questions, answered with the vector added and subtracted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..directions import Direction
from ..errors import UserError
from ..files import read_record, write_json, write_record
from ..generation import generate
from ..interventions import Add, Positions
from ..judges.named import refused
from ..judges.substring import Judge, SubstringJudge, blind_spot, is_degenerate
from ..model.points import HookedModel, explain_layer, model_source, our_layer
from ..model.provenance import describe_model, versions
from ..run.stages import RunFolder
from ..stats import Rate
from ..text.chat import ChatFormat
from ..values import Value


@dataclass(frozen=True)
class SteeredAnswer:
    """A question and its answers, as published result files hold them, with the plain model's answer."""

    question: str
    answer_baseline: str
    answer_with_add_steering: str
    answer_with_substract_steering: str
    """Spelled as there."""


@dataclass(frozen=True)
class TextRates:
    """How many answers look like refusals, and how many are no text."""

    refusal_like_rate: Rate
    degenerate_rate: Rate


@dataclass(frozen=True)
class Steered:
    """One multiplier, both ways."""

    add: TextRates
    subtract: TextRates
    first_question: SteeredAnswer


@dataclass(frozen=True, eq=False, repr=False)
class OpenAnswers(Value):
    """What `test_summary.json` holds."""

    layer: int
    """CAA's layer."""
    positions: Positions
    max_new_tokens: int
    n_questions: int
    judge: str
    baseline: TextRates
    by_multiplier: dict[str, Steered]
    judge_caution: str | None = None
    """What its phrases cannot read in the questions and plain answers; None where all is well."""

    def describe(self) -> dict[str, Any]:
        """JSON values: the fields, and the layer in words."""
        return {**vars(self), "layer_means": explain_layer(self.layer)}


def open_ended(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    layer: int,
    questions: Sequence[str],
    multipliers: Sequence[float],
    folder: RunFolder,
    *,
    positions: Positions = "response",
    max_new_tokens: int = 50,
    batch_size: int = 8,
    judge: Judge | None = None,
) -> OpenAnswers:
    """Answers with the vector added and subtracted: `test_results_x{m}.json`, summed up in `test_summary.json`.

    Each multiplier is a stage of the folder.

    Args:
        layer: CAA's layer; the vector is added to the output of this block.

    Raises:
        UserError: there are no questions or no multipliers, or the model has no such block.
    """
    if not questions or not multipliers:
        raise UserError(f"there are no {'multipliers' if questions else 'questions to answer'}")
    place, judge = our_layer(layer, model.cfg.n_layers), judge or SubstringJudge()
    inputs = {
        "model": describe_model(model, model_source(model)),
        "chat": chat.record(),
        "versions": versions(),
        "questions": list(questions),
        "vector": direction.vector.tolist(),
        "place": {"layer": place, "positions": positions},
        "max_new_tokens": max_new_tokens,
    }

    def answers(multiplier: float | None) -> list[str]:
        answered = generate(
            model,
            chat,
            questions,
            interventions=() if multiplier is None else (Add(direction, multiplier, place, positions),),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description="plain" if multiplier is None else f"multiplier {multiplier:g}",
        )
        return [answer.text for answer in answered]

    plain = cache(lambda: answers(None))

    def stored(multiplier: float) -> list[SteeredAnswer]:
        file = f"test_results_x{multiplier:g}.json"

        def write() -> None:
            columns = questions, plain(), answers(multiplier), answers(-multiplier)
            write_json(folder.path / file, [SteeredAnswer(*row) for row in zip(*columns, strict=True)])

        about = f"{len(questions)} questions, answered with and without steering"
        folder.stage(f"test_x{multiplier:g}", inputs | {"multiplier": multiplier}, [file], write, about=about)
        return read_record(folder.path / file, list[SteeredAnswer])

    by_multiplier: dict[str, Steered] = {}
    for multiplier in multipliers:
        rows = stored(multiplier)
        added = _text_rates(questions, [row.answer_with_add_steering for row in rows], judge)
        subtracted = _text_rates(questions, [row.answer_with_substract_steering for row in rows], judge)
        by_multiplier[f"{multiplier:g}"] = Steered(added, subtracted, rows[0])
    plain_texts = [row.answer_baseline for row in rows]
    baseline, note = _text_rates(questions, plain_texts, judge), blind_spot(judge, questions, plain_texts)
    summary = OpenAnswers(layer, positions, max_new_tokens, len(questions), judge.name, baseline, by_multiplier, note)
    write_record(folder.path / "test_summary.json", summary)
    return summary


def _text_rates(questions: Sequence[str], texts: Sequence[str], judge: Judge) -> TextRates:
    return TextRates(Rate.of(refused(judge, questions, texts)), Rate.of([is_degenerate(text) for text in texts]))
