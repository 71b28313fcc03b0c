"""What a steering vector does to open answers: added and subtracted by several multipliers, beside the plain model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..chat import ChatFormat
from ..directions import Direction
from ..errors import UserError
from ..files import read_json, write_json
from ..generation import generate
from ..interventions import Add, Positions
from ..judges import Judge, SubstringJudge, is_degenerate
from ..models import HookedModel, model_source
from ..provenance import describe_model, versions
from ..stages import RunFolder
from ..stats import Rate
from .caa import explain_layer, our_layer

ANSWER_KEYS = ("question", "answer_baseline", "answer_with_add_steering", "answer_with_substract_steering")
"""Of the published result files, spelled as there, with the plain model's answer."""


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
) -> dict[str, Any]:
    """Answers with the vector added and subtracted: `test_results_x{m}.json`; returns `test_summary.json`.

    Each multiplier is a stage of the folder.

    Args:
        layer: CAA's layer; the vector is added to the output of this block.

    Raises:
        UserError: there are no questions, or the model has no such block.
    """
    if not questions:
        raise UserError("there are no questions to answer")
    place, judge = our_layer(layer, model.cfg.n_layers), judge or SubstringJudge()
    inputs = {
        "model": describe_model(model, model_source(model)),
        "chat": chat.describe(),
        "versions": versions(),
        "questions": list(questions),
        "vector": direction.vector.tolist(),
        "place": {"layer": place, "positions": positions},
        "max_new_tokens": max_new_tokens,
    }

    def answers(multiplier: float | None) -> list[str]:
        steering = () if multiplier is None else (Add(direction, multiplier, place, positions),)
        found = generate(
            model,
            chat,
            questions,
            interventions=steering,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description="plain" if multiplier is None else f"multiplier {multiplier:g}",
        )
        return [answer.text for answer in found]

    plain = cache(lambda: answers(None))

    def rows(multiplier: float) -> list[dict[str, str]]:
        columns = questions, plain(), answers(multiplier), answers(-multiplier)
        return [dict(zip(ANSWER_KEYS, row, strict=True)) for row in zip(*columns, strict=True)]

    summary: dict[str, Any] = {
        "layer": layer,
        "layer_means": explain_layer(layer),
        "positions": positions,
        "max_new_tokens": max_new_tokens,
        "n_questions": len(questions),
        "judge": judge.name,
        "by_multiplier": {},
    }
    for multiplier in multipliers:
        file = f"test_results_x{multiplier:g}.json"
        write = lambda file=file, m=multiplier: write_json(folder.path / file, rows(m))  # noqa: E731
        about = f"{len(questions)} questions, answered with and without steering"
        folder.stage(f"test_x{multiplier:g}", inputs | {"multiplier": multiplier}, [file], write, about=about)
        found = read_json(folder.path / file)
        _, baseline, added, subtracted = ([row[key] for row in found] for key in ANSWER_KEYS)
        summary["baseline"] = _text_rates(questions, baseline, judge)
        summary["by_multiplier"][f"{multiplier:g}"] = {
            "add": _text_rates(questions, added, judge),
            "subtract": _text_rates(questions, subtracted, judge),
            "first_question": found[0],
        }
    write_json(folder.path / "test_summary.json", summary)
    return summary


def _text_rates(questions: Sequence[str], answers: Sequence[str], judge: Judge) -> dict[str, Any]:
    complied = judge.complied(questions, answers)
    return {
        "refusal_like_rate": Rate.of([not flag for flag in complied]).describe(),
        "degenerate_rate": Rate.of([is_degenerate(answer) for answer in answers]).describe(),
    }
