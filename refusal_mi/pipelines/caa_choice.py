"""Which layer and multiplier of a CAA vector to use: chosen on other pairs than those reported, against controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import ChatFormat
from ..directions import Direction
from ..files import write_json
from ..generation import generate
from ..interventions import Add, Positions
from ..judges import is_degenerate
from ..models import HookedModel
from ..pairs import PairSet
from ..stages import RunFolder
from ..stats import Rate
from .caa import explain_layer, our_layer
from .caa_ab import ABSweep, sweep_pairs, vector_for

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
