"""CAA (Rimsky et al. 2024): steering vectors from A/B pairs, what they do to answers and to choices.

CAA's layer L is the output of block L; this package's layer l is the stream entering block l. `model/points.py`
converts between the two.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, load_direction
from ..errors import UserError
from ..files import read_json, sha256_json, write_json
from ..model.loading import ORGANISM
from ..model.points import HookedModel, caa_hook, caa_layer, our_layer, resid_hook
from ..model.provenance import describe_model
from ..reading import combine_spans
from ..text.chat import ChatFormat
from ..text.pairs import PAIR_SETS, ABPair, PairSet, load_pairs, locate_letter, with_flipped_half
from ..values import Value

SHUFFLED = "shuffled"
"""Folder of the control vectors, inside the folder of the vectors."""
PAIRS = "made_from_pairs.json"
"""The pairs that the vectors of a folder were made from."""
MIN_CONTROL_PAIRS = 8


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors(Value):
    """CAA vectors of every layer, and their control."""

    vectors: Float[Tensor, "layer d_model"]
    """Row L: the output of block L; float64, raw difference of means."""
    shuffled: Float[Tensor, "layer d_model"] | None
    """From labels of which half were exchanged: what the same pairs give without their labels; None for too few."""


def steering_vectors(
    model: HookedModel, chat: ChatFormat, pairs: PairSet, *, batch_size: int = 8, seed: int = 0
) -> SteeringVectors:
    """v_L = mean over pairs of (stream at the matching answer's letter − at the other's), at the output of block L.

    Args:
        seed: of the exchange of labels for the control.
    """
    answers = [(pair.question, answer) for pair in pairs.pairs for answer in (pair.matching, pair.not_matching)]
    spans = [locate_letter(chat, *answer).span for answer in answers]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(pairs)) / len(pairs)
    flips = torch.tensor(with_flipped_half(pairs.pairs, seed)).repeat_interleave(2)
    weights = torch.stack([signs, torch.where(flips, -signs, signs)])
    streams = combine_spans(model, spans, weights, pad_id=chat.pad_id, batch_size=batch_size)
    n_layers = model.cfg.n_layers
    real, shuffled = streams[:, [our_layer(layer, n_layers) for layer in range(n_layers)]]
    enough = len(pairs) >= MIN_CONTROL_PAIRS and bool(shuffled.norm(dim=-1).all())
    return SteeringVectors(real, shuffled if enough else None)


def published_name(source: str) -> str:
    """The part of CAA's file names that says which model: its name without the owner."""
    return "organism" if source == str(ORGANISM) else Path(source).name


def vector_name(layer: int, model_name: str) -> str:
    """The published file name."""
    return f"vec_layer_{layer}_{model_name}.pt"


def write_vectors(
    model: HookedModel,
    source: str,
    chat: ChatFormat,
    pairs: PairSet,
    directory: Path,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[int, Direction]:
    """Compute the vectors and write one file per CAA layer, with its Direction JSON, the controls, and the pairs.

    Args:
        layers: CAA layers; None is all.

    Raises:
        UserError: vectors of another model of the same name lie there.
    """
    n_layers = model.cfg.n_layers
    for file in sorted(directory.glob(f"vec_layer_*_{escape(published_name(source))}_metadata.json")):
        before = read_json(file)
        of = before.get("model", source) if isinstance(before, dict) else source
        if of != source:
            raise UserError(f"{file} is of {of}, and vectors of {source} have its name: choose another --output-dir")
    wanted = list(range(n_layers)) if layers is None else list(layers)
    for layer in wanted:
        our_layer(layer, n_layers)
    computed = steering_vectors(model, chat, pairs, batch_size=batch_size, seed=seed)
    record = describe_model(model, source)
    common = {
        "pairs": pairs.name,
        "pairs_sha256": pairs.sha256,
        "n_pairs": len(pairs),
        "model": source,
        "revision": record.revision,
        "fingerprint": record.fingerprint,
        "system": chat.system,
        "template_sha256": sha256_json(chat.tokenizer.chat_template),
        "read_at": "the token that covers the answer's letter",
    }
    kinds = {
        "": (computed.vectors, "difference of means over A/B pairs (CAA)"),
        SHUFFLED: (computed.shuffled, f"the same from shuffled labels (seed {seed})"),
    }
    made = {
        folder: {layer: _direction(vectors[layer], layer, n_layers, {"method": method, **common}) for layer in wanted}
        for folder, (vectors, method) in kinds.items()
        if vectors is not None
    }
    for folder, directions in made.items():
        for layer, direction in directions.items():
            direction.save(directory / folder / vector_name(layer, published_name(source)))
    write_json(directory / PAIRS, pairs.pairs)
    return made[""]


def pairs_behind(path: Path, vectors: Mapping[int, Direction], also: Sequence[PairSet] = ()) -> frozenset[ABPair]:
    """The pairs that vectors were made from; none where that is not known.

    Args:
        path: where the vectors lie: one file, or a folder.
        vectors: as they were loaded from there; what they say of their pairs decides.
        also: sets that it may have been, beside the bundled ones and the one that lies with the vectors.
    """
    hashes = {vector.provenance.get("pairs_sha256") for vector in vectors.values()}
    beside = (path if path.is_dir() else path.parent) / PAIRS
    sources: list[str | Path] = [*PAIR_SETS, *([beside] if beside.is_file() else [])]
    sets = [*also, *map(load_pairs, sources)]
    return frozenset(pair for pairs in sets if pairs.sha256 in hashes for pair in pairs.pairs)


def check_vectors(path: Path) -> None:
    """Make sure that there is something to load, before a model is.

    Raises:
        UserError: there is no such file or folder.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; make vectors with refusal-mi caa vectors, or name --vector")


def load_vectors(
    path: Path, source: str, n_layers: int, layer: int | None = None, *, moves: bool = False
) -> dict[int, Direction]:
    """CAA layer -> vector, from one file or from a folder that `write_vectors` filled.

    Args:
        n_layers: of the model that they are used in.
        layer: of one file, and `moves`, as `directions.load_direction` takes them.

    Raises:
        UserError: there are no vectors of this model, they were made from different pairs, or one has no place.
    """
    check_vectors(path)
    if not path.is_dir():
        direction = load_direction(path, n_layers, layer, moves=moves)
        return {caa_layer(direction.layer): direction}
    name = published_name(source)
    named = {file: re.fullmatch(r"vec_layer_\d+_(.+)", file.stem) for file in sorted(path.glob("vec_layer_*.pt"))}
    models = {file: match[1] for file, match in named.items() if match}
    directions = [load_direction(file, n_layers) for file, owner in models.items() if owner == name]
    if not directions:
        others = sorted(set(models.values()))
        held = f"it has vectors of {', '.join(others)}" if others else "it has no vec_layer_{L}_{model}.pt files"
        raise UserError(f"{path} has no vectors of {name}: {held}; make them with refusal-mi caa vectors")
    if len({direction.provenance.get("pairs_sha256") for direction in directions}) > 1:
        raise UserError(f"the vectors in {path} were made from different pairs; make them again in another folder")
    return {caa_layer(direction.layer): direction for direction in directions}


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


def load_controls(
    path: Path, source: str, n_layers: int, vectors: Mapping[int, Direction]
) -> dict[str, dict[int, Direction]]:
    """Controls for every vector, by kind: random ones of its norm, and those of shuffled labels that lie beside it."""
    controls = {"random vectors of equal norm": {layer: vector.random_like(0) for layer, vector in vectors.items()}}
    beside = path / SHUFFLED
    shuffled = load_vectors(beside, source, n_layers) if path.is_dir() and beside.is_dir() else {}
    if set(vectors) <= set(shuffled):
        controls["shuffled labels"] = {layer: shuffled[layer] for layer in vectors}
    return controls


def _direction(
    vector: Float[Tensor, " d_model"], layer: int, n_layers: int, provenance: Mapping[str, Any]
) -> Direction:
    place = our_layer(layer, n_layers)
    translation = {"caa_layer": layer, "caa_hook_name": caa_hook(layer)}
    return Direction(vector.float(), place, resid_hook(place, n_layers), None, {**provenance, **translation})
