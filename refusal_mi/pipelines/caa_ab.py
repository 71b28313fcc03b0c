"""CAA's multiple-choice evaluation: p(matching answer) by layer and multiplier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..ab_scores import ABQuestions, p_matching
from ..chat import ChatFormat
from ..directions import Direction
from ..errors import UserError
from ..files import read_json, write_json
from ..interventions import Add, Positions
from ..models import HookedModel, model_source
from ..pairs import ABPair, PairSet
from ..progress import track
from ..provenance import describe_model, versions
from ..stages import RunFolder
from ..stats import mean_interval
from .caa import explain_layer, our_layer


@dataclass(frozen=True)
class ABPoint:
    """Mean p(matching answer) with a vector added to the output of one block."""

    layer: int
    """CAA's layer."""
    multiplier: float
    p: float
    low: float
    high: float
    """95% interval of the mean."""
    delta: float
    """p − p of the plain model."""
    delta_low: float
    delta_high: float
    """95% interval of the mean change, pair by pair."""
    n_pairs: int


@dataclass(frozen=True)
class ABSweep:
    """All layers and multipliers on one set of pairs."""

    pairs: str
    plain: float
    """p(matching) of the plain model."""
    points: tuple[ABPoint, ...]
    n_by_letter: int
    """Pairs read from the letter token; the others from the whole answer."""

    def at(self, layer: int, multiplier: float) -> ABPoint:
        """The point at a layer and multiplier."""
        return next(point for point in self.points if (point.layer, point.multiplier) == (layer, multiplier))

    def effects(self) -> list[tuple[float, int, float]]:
        """(effect, layer, m) for every layer and m > 0 swept with both signs, largest first.

        The effect is the smaller of what adding raises and what subtracting lowers.
        """
        deltas = {(point.layer, point.multiplier): point.delta for point in self.points}
        found = [
            (min(delta, -deltas[layer, -m]), layer, m)
            for (layer, m), delta in deltas.items()
            if m > 0 and (layer, -m) in deltas
        ]
        return sorted(found, key=lambda entry: -entry[0])

    @property
    def largest_change(self) -> float:
        """The largest change of p in either direction, at any layer and multiplier."""
        return max((abs(point.delta) for point in self.points), default=0.0)

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        rows = [{**vars(point), "layer_means": explain_layer(point.layer)} for point in self.points]
        return {"pairs": self.pairs, "p_plain": self.plain, "n_pairs_by_letter": self.n_by_letter, "rows": rows}


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
    base = {"model": model_record, "chat": chat.describe(), "versions": versions(), "pairs": pairs.sha256}

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
