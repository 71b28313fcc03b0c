"""CAA's evaluations: p(matching answer) by layer and multiplier, the choice among them, open answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..files import read_json, write_json
from ..generation import generate
from ..interventions import Add, Positions
from ..judges.substring import Judge, SubstringJudge, is_degenerate
from ..measures import ABPoint, ABQuestions, ABSweep, p_matching
from ..model.points import HookedModel, explain_layer, model_source, our_layer
from ..model.provenance import describe_model, versions
from ..progress import track
from ..run.stages import RunFolder
from ..stats import Rate, mean_interval
from ..text.chat import ChatFormat
from ..text.pairs import ABPair, PairSet


def sweep_pairs(
    model: HookedModel,
    chat: ChatFormat,
    vectors: Mapping[int, Direction],
    pairs: PairSet,
    multipliers: Sequence[float],
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "response",
    batch_size: int = 32,
    folder: RunFolder | None = None,
    where: str = "",
) -> ABSweep:
    """p(matching) with each layer's vector added, times each multiplier.

    Args:
        vectors: CAA layer -> vector; a single one is applied at every layer of `layers`.
        layers: CAA layers; None is those of `vectors`.
        folder: where CAA's own files are written, one stage per layer and multiplier; those done before are kept.
        where: folder inside it, with its slash.

    Raises:
        UserError: there is no vector for a layer.
    """
    questions = ABQuestions(chat, pairs.pairs)
    wanted = sorted(vectors) if layers is None else list(layers)
    model_record = describe_model(model, model_source(model))
    base = {"model": model_record, "chat": chat.record(), "versions": versions(), "pairs": pairs.sha256}

    def items(*steering: Add) -> list[dict[str, Any]]:
        return _published_items(pairs, questions.log_probabilities(model, steering, batch_size=batch_size))

    def stored(layer: int, multiplier: float, steering: Add) -> list[dict[str, Any]]:
        if folder is None:
            return items(steering)
        file = f"{where}results_layer={layer}_multiplier={float(multiplier)}_type=ab.json"
        place = {"layer": steering.layer, "multiplier": multiplier, "positions": positions}
        inputs = base | place | {"vector": steering.direction.vector.tolist()}
        name = file.removesuffix(".json").replace("/", "_")
        folder.stage(name, inputs, [file], lambda: write_json(folder.path / file, items(steering)))
        return read_json(folder.path / file)

    plain = p_matching(_log_p(pairs, items())).tolist()
    points = []
    for layer in track(wanted, f"p(matching) on {pairs.name}"):
        place, direction = our_layer(layer, model.cfg.n_layers), vector_for(vectors, layer)
        for multiplier in multipliers:
            answered = stored(layer, multiplier, Add(direction, multiplier, place, positions))
            p = p_matching(_log_p(pairs, answered)).tolist()
            change = mean_interval([after - before for after, before in zip(p, plain, strict=True)])
            points.append(ABPoint(layer, multiplier, *mean_interval(p), *change, len(pairs)))
    return ABSweep(pairs.name, mean_interval(plain)[0], tuple(points), questions.n_by_letter)


def vector_for(vectors: Mapping[int, Direction], layer: int) -> Direction:
    """The vector of a CAA layer; a single one serves every layer.

    Raises:
        UserError: there is none.
    """
    if len(vectors) == 1:
        return next(iter(vectors.values()))
    if layer not in vectors:
        raise UserError(f"there is no vector of layer {layer}; there are {sorted(vectors)}")
    return vectors[layer]


def _published_items(pairs: PairSet, log_p: Float[Tensor, "pair 2"]) -> list[dict[str, Any]]:
    """One object per pair; the answers in alphabetical order are its a and b."""
    items = []
    for pair, (matching, other) in zip(pairs.pairs, torch.exp(log_p).tolist(), strict=True):
        a, b = (matching, other) if _matching_is_first(pair) else (other, matching)
        items.append({**pair.describe(), "a_prob": a, "b_prob": b})
    return items


def _log_p(pairs: PairSet, items: Sequence[Mapping[str, Any]]) -> Float[Tensor, "pair 2"]:
    keys = [("a_prob", "b_prob") if _matching_is_first(pair) else ("b_prob", "a_prob") for pair in pairs.pairs]
    rows = [[item[key] for key in both] for item, both in zip(items, keys, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).log()


def _matching_is_first(pair: ABPair) -> bool:
    return pair.matching < pair.not_matching


MAX_DEGENERATE = 0.05
"""A multiplier is sound while at most this fraction of answers is degenerate text."""


@dataclass(frozen=True)
class ABTask:
    """What `evaluate_choices` sweeps."""

    multipliers: tuple[float, ...]
    layers: tuple[int, ...] | None
    """CAA layers; None is those of the vectors."""
    positions: Positions
    batch_size: int
    max_new_tokens: int
    """Of the answers whose text is checked."""
    vector: str
    """Where the vectors lie, for the record."""


def evaluate_choices(
    model: HookedModel,
    chat: ChatFormat,
    vectors: Mapping[int, Direction],
    controls: Mapping[str, Mapping[int, Direction]],
    reported: PairSet,
    other: PairSet,
    questions: Sequence[str],
    folder: RunFolder,
    task: ABTask,
) -> tuple[dict[str, Any], ABSweep]:
    """p(matching) on `reported` by layer and multiplier, and the best of them chosen on `other`: `ab_results.json`.

    A layer is chosen only where the vector moves the choice on `other` further, both ways, than the controls do at
    any layer and multiplier there.

    Args:
        controls: from `load_controls`.
        questions: on which the text is checked; none: nothing is chosen.
    """
    common: dict[str, Any] = {"positions": task.positions, "batch_size": task.batch_size}

    def sweep(which: Mapping[int, Direction], pairs: PairSet, where: str = "") -> ABSweep:
        quiet = RunFolder(folder.path, folder.fresh)
        folder.report(f"p(matching) on {len(pairs)} pairs of {pairs.name}{f' ({where[:-1]})' if where else ''}")
        options: dict[str, Any] = {"layers": task.layers, "folder": quiet, "where": where, **common}
        return sweep_pairs(model, chat, which, pairs, task.multipliers, **options)

    found = sweep(vectors, reported)
    record: dict[str, Any] = {**found.describe(), "positions": task.positions, "vector": task.vector, "chosen": None}
    if not questions:
        record["why_none"] = "there are no questions on which to check the text"
    elif not found.effects():
        record["why_none"] = "it takes a positive multiplier with both signs, such as --multipliers -1 1"
    elif set(reported.pairs) & set(other.pairs):
        record["why_none"] = f"{reported.name} and {other.name} share pairs; it takes others: --choose-on"
    else:
        on_other = sweep(vectors, other, "choosing/")
        moved = {
            kind: sweep(control, other, f"choosing/{_folder(kind)}/").largest_change
            for kind, control in controls.items()
        }
        strongest = max(moved, key=lambda kind: moved[kind])
        options = {"beyond": moved[strongest], "max_new_tokens": task.max_new_tokens, **common}
        picked = choose(model, chat, vectors, on_other, questions, **options)
        best = on_other.effects()[0][0]
        record["controls"] = {"largest_change": moved, "pairs": other.name}
        if picked is not None:
            changes = {
                kind: _changes(sweep(control, reported, f"{_folder(kind)}/"), picked)
                for kind, control in controls.items()
            }
            record["chosen"] = {**picked, **_changes(found, picked), "controls": changes}
        elif best <= moved[strongest]:
            record["why_none"] = (
                f"no layer moves the choice on {other.name} beyond what {strongest} do: both ways at most "
                f"{max(best, 0.0):.3g}, against {moved[strongest]:.3g}"
            )
        else:
            record["why_none"] = "where the choice moves, the answers are degenerate text; try smaller multipliers"
    write_json(folder.path / "ab_results.json", record)
    return record, found


def choose(
    model: HookedModel,
    chat: ChatFormat,
    vectors: Mapping[int, Direction],
    chosen_on: ABSweep,
    questions: Sequence[str],
    *,
    beyond: float = 0.0,
    positions: Positions = "response",
    max_new_tokens: int = 50,
    batch_size: int = 8,
    max_tries: int = 8,
) -> dict[str, Any] | None:
    """The layer and multiplier with the largest effect on `chosen_on` at which text is still text, with both signs.

    Args:
        beyond: an effect must be larger: what control vectors change.

    Returns:
        None where no positive multiplier was swept with both signs, no effect is beyond the controls', or none of
        the `max_tries` best is sound.
    """
    tried: list[dict[str, Any]] = []
    for effect, layer, multiplier in chosen_on.effects()[:max_tries]:
        if effect <= beyond:
            break
        place, direction = our_layer(layer, model.cfg.n_layers), vector_for(vectors, layer)
        broken = []
        for sign in (1, -1):
            steering = Add(direction, sign * multiplier, place, positions)
            answers = generate(
                model,
                chat,
                questions,
                interventions=(steering,),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                description=f"layer {layer}, multiplier {sign * multiplier:g}",
            )
            broken.append(Rate.of([is_degenerate(answer.text) for answer in answers]))
        found = {
            "layer": layer,
            "layer_means": explain_layer(layer),
            "multiplier": multiplier,
            "chosen_on": chosen_on.pairs,
            "effect_there": effect,
            "degenerate_added": broken[0].describe(),
            "degenerate_subtracted": broken[1].describe(),
        }
        if all(rate.value <= MAX_DEGENERATE for rate in broken):
            return {**found, "tried_before": tried}
        tried.append(found)
    return None


def _folder(kind: str) -> str:
    return kind.replace(" ", "_")


def _changes(sweep: ABSweep, picked: Mapping[str, Any]) -> dict[str, float]:
    up, down = (sweep.at(picked["layer"], sign * picked["multiplier"]) for sign in (1, -1))
    return {
        "p_plain": sweep.plain,
        "p_added": up.p,
        "p_subtracted": down.p,
        "change_added": up.delta,
        "change_subtracted": down.delta,
    }


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
        "chat": chat.record(),
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
