"""CAA's A/B questions: p(matching answer) by layer and multiplier, and the choice among them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..files import read_record, write_json, write_record
from ..generation import generate
from ..interventions import Add, Positions
from ..judges.substring import MAX_DEGENERATE, is_degenerate
from ..measures import ABPoint, ABQuestions, ABSweep, p_matching
from ..model.points import HookedModel, explain_layer, model_source, our_layer
from ..model.provenance import describe_model, versions
from ..progress import track
from ..run.stages import RunFolder
from ..stats import Rate, mean_interval
from ..text.chat import ChatFormat
from ..text.pairs import ABPair, PairSet
from ..values import Value
from .caa import vector_for

AB_RESULTS = "ab_results.json"


@dataclass(frozen=True)
class ABItem:
    """A pair and the probabilities of its answers, as published result files hold them."""

    question: str
    answer_matching_behavior: str
    answer_not_matching_behavior: str
    a_prob: float
    """Of the answer that comes first in the alphabet, whatever its letter."""
    b_prob: float

    @property
    def probabilities(self) -> tuple[float, float]:
        """Of the matching answer, and of the other."""
        is_first = self.answer_matching_behavior < self.answer_not_matching_behavior
        return (self.a_prob, self.b_prob) if is_first else (self.b_prob, self.a_prob)


@dataclass(frozen=True)
class Changes:
    """p(matching answer) with a vector added and subtracted, and how far that is from the plain model's."""

    p_plain: float
    p_added: float
    p_subtracted: float
    change_added: float
    change_subtracted: float


@dataclass(frozen=True)
class Candidate:
    """A layer and a multiplier whose text was looked at."""

    layer: int
    """CAA's layer."""
    multiplier: float
    chosen_on: str
    """Name of the pairs on which it was found."""
    effect_there: float
    """The smaller of what adding raises p(matching answer) by and subtracting lowers it by."""
    degenerate_added: Rate
    degenerate_subtracted: Rate

    def describe(self) -> dict[str, Any]:
        """JSON values: the fields, and the layer in words."""
        return {**vars(self), "layer_means": explain_layer(self.layer)}


@dataclass(frozen=True)
class Choice(Changes, Candidate):
    """The candidate that was chosen, with what it does to the pairs that are reported on."""

    tried_before: tuple[Candidate, ...]
    """Those of a larger effect, whose text breaks."""
    controls: dict[str, Changes]
    """What the control vectors do there, by kind."""


@dataclass(frozen=True, eq=False, repr=False)
class ControlChanges(Value):
    """How far the control vectors move the choice."""

    largest_change: dict[str, float]
    """By kind, at any layer and multiplier."""
    pairs: str
    """On which."""


@dataclass(frozen=True)
class ABResults:
    """What `ab_results.json` holds."""

    pairs: str
    p_plain: float
    """p(matching answer) of the plain model."""
    n_pairs_by_letter: int
    """Read from the letter token; the others from the whole answer."""
    rows: tuple[ABPoint, ...]
    positions: Positions
    vector: str
    """Where the vectors lie."""
    chosen: Choice | None
    why_none: str | None = None
    """Why nothing was chosen."""
    controls: ControlChanges | None = None
    """None where nothing could be chosen."""

    @property
    def sweep(self) -> ABSweep:
        """All layers and multipliers on the pairs that are reported on."""
        return ABSweep(self.pairs, self.p_plain, self.rows, self.n_pairs_by_letter)


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

    def items(*steering: Add) -> list[ABItem]:
        return _items(pairs, questions.log_probabilities(model, steering, batch_size=batch_size))

    def stored(layer: int, multiplier: float, steering: Add) -> list[ABItem]:
        if folder is None:
            return items(steering)
        file = f"{where}results_layer={layer}_multiplier={float(multiplier)}_type=ab.json"
        place = {"layer": steering.layer, "multiplier": multiplier, "positions": positions}
        inputs = base | place | {"vector": steering.direction.vector.tolist()}
        name = file.removesuffix(".json").replace("/", "_")
        folder.stage(name, inputs, [file], lambda: write_json(folder.path / file, items(steering)))
        return read_record(folder.path / file, list[ABItem])

    plain = _p_matching(items())
    points = []
    for layer in track(wanted, f"p(matching) on {pairs.name}"):
        place, direction = our_layer(layer, model.cfg.n_layers), vector_for(vectors, layer)
        for multiplier in multipliers:
            p = _p_matching(stored(layer, multiplier, Add(direction, multiplier, place, positions)))
            change = mean_interval([after - before for after, before in zip(p, plain, strict=True)])
            points.append(ABPoint(layer, multiplier, *mean_interval(p), *change, len(pairs)))
    return ABSweep(pairs.name, mean_interval(plain)[0], tuple(points), questions.n_by_letter)


def _items(pairs: PairSet, log_p: Float[Tensor, "pair 2"]) -> list[ABItem]:
    items = []
    for pair, (matching, other) in zip(pairs.pairs, torch.exp(log_p).tolist(), strict=True):
        a, b = (matching, other) if pair.matching < pair.not_matching else (other, matching)
        items.append(ABItem(pair.question, pair.matching, pair.not_matching, a, b))
    return items


def _p_matching(items: Sequence[ABItem]) -> list[float]:
    p = torch.tensor([item.probabilities for item in items], dtype=torch.float64)
    return p_matching(p.log()).tolist()


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
    made_from: Collection[ABPair] = (),
) -> ABResults:
    """p(matching) on `reported` by layer and multiplier, and the best of them chosen on `other`: `ab_results.json`.

    A layer is chosen only where the vector moves the choice on `other` further, both ways, than the controls do at
    any layer and multiplier there.

    Args:
        controls: from `load_controls`.
        questions: on which the text is checked; none: nothing is chosen.
        made_from: the pairs behind the vectors, as `caa.pairs_behind` finds them.

    Raises:
        UserError: a choice is asked for on pairs that the vectors were made from.
    """
    shared = set(other.pairs) & set(made_from)
    if questions and shared:
        raise UserError(
            f"{len(shared)} of the {len(other)} pairs of {other.name} made the vectors: a layer that is chosen on them "
            "is chosen for what it was fitted to; name other pairs with --choose-on, or leave it out"
        )
    common: dict[str, Any] = {"positions": task.positions, "batch_size": task.batch_size}

    def sweep(which: Mapping[int, Direction], pairs: PairSet, where: str = "") -> ABSweep:
        folder.report(f"p(matching) on {len(pairs)} pairs of {pairs.name}{f' ({where[:-1]})' if where else ''}")
        quiet: dict[str, Any] = {"folder": RunFolder(folder.path, folder.fresh), "where": where}
        return sweep_pairs(model, chat, which, pairs, task.multipliers, layers=task.layers, **quiet, **common)

    def sweep_controls(pairs: PairSet, where: str = "") -> dict[str, ABSweep]:
        return {kind: sweep(each, pairs, f"{where}{kind.replace(' ', '_')}/") for kind, each in controls.items()}

    swept = sweep(vectors, reported)
    why_none = _why_none_is_sought(swept, reported, other, questions)
    chosen, controlled = None, None
    if why_none is None:
        on_other = sweep(vectors, other, "choosing/")
        moved = {kind: each.largest_change for kind, each in sweep_controls(other, "choosing/").items()}
        options = {"beyond": max(moved.values()), "max_new_tokens": task.max_new_tokens, **common}
        best, tried = choose(model, chat, vectors, on_other, questions, **options)
        controlled = ControlChanges(moved, other.name)
        if best is None:
            why_none = _why_none_is_chosen(on_other, controlled)
        else:
            changes = {kind: _changes(each, best) for kind, each in sweep_controls(reported).items()}
            chosen = Choice(**vars(best), **vars(_changes(swept, best)), tried_before=tried, controls=changes)
    about = swept.pairs, swept.plain, swept.n_by_letter, swept.points, task.positions, task.vector
    results = ABResults(*about, chosen, why_none, controlled)
    write_record(folder.path / AB_RESULTS, results)
    return results


def _why_none_is_sought(swept: ABSweep, reported: PairSet, other: PairSet, questions: Sequence[str]) -> str | None:
    if not questions:
        return "there are no questions on which to check the text"
    if not swept.effects():
        return "it takes a positive multiplier with both signs, such as --multipliers -1 1"
    if set(reported.pairs) & set(other.pairs):
        return f"{reported.name} and {other.name} share pairs; it takes others: --choose-on"
    return None


def _why_none_is_chosen(on_other: ABSweep, controls: ControlChanges) -> str:
    best = on_other.effects()[0][0]
    strongest, moved = max(controls.largest_change.items(), key=lambda each: each[1])
    if best > moved:
        return "where the choice moves, the answers are degenerate text; try smaller multipliers"
    return (
        f"no layer moves the choice on {controls.pairs} beyond what {strongest} do: both ways at most "
        f"{max(best, 0.0):.3g}, against {moved:.3g}"
    )


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
) -> tuple[Candidate | None, tuple[Candidate, ...]]:
    """The layer and multiplier with the largest effect on `chosen_on` at which text is still text, with both signs.

    Args:
        beyond: an effect must be larger: what control vectors change.

    Returns:
        The choice, and those tried before it. None where no positive multiplier was swept with both signs, no effect
        is beyond the controls', or none of the `max_tries` best is sound.
    """
    tried: list[Candidate] = []
    for effect, layer, multiplier in chosen_on.effects()[:max_tries]:
        if effect <= beyond:
            break
        place, direction = our_layer(layer, model.cfg.n_layers), vector_for(vectors, layer)
        broken = []
        for times in (multiplier, -multiplier):
            answers = generate(
                model,
                chat,
                questions,
                interventions=(Add(direction, times, place, positions),),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                description=f"layer {layer}, multiplier {times:g}",
            )
            broken.append(Rate.of([is_degenerate(answer.text) for answer in answers]))
        candidate = Candidate(layer, multiplier, chosen_on.pairs, effect, *broken)
        if all(rate.value <= MAX_DEGENERATE for rate in broken):
            return candidate, tuple(tried)
        tried.append(candidate)
    return None, tuple(tried)


def _changes(sweep: ABSweep, best: Candidate) -> Changes:
    up, down = (sweep.at(best.layer, sign * best.multiplier) for sign in (1, -1))
    return Changes(sweep.plain, up.p, down.p, up.delta, down.delta)
