"""Directions in the residual stream: one, a grid of candidates, files of several; estimated, compared, saved."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .files import (
    at_home,
    floats,
    read_floats,
    read_json,
    read_record,
    read_tensors,
    write_json,
    write_tensors,
    write_vector,
)
from .model.points import block_hook, is_between_blocks, is_in_stream, place_of_hook, resid_hook, stream_after
from .precision import with_float64
from .values import Value, frame, html_table, text_table
from .vectors import at_layer, is_whole, layer_by_name, one_vector, read_vectors, unit_of, vectors_in

_RESID_PRE = re.compile(r"blocks\.(\d{1,9})\.hook_resid_pre")
N_SHOWN = 5
"""Rows of a grid that its representation shows."""
_LONGEST = ("position", "layer", "norm")
FILE = "direction.pt"
"""Of a run folder: its direction."""
MIN_RELATIVE_NORM = 1e-6
"""A difference of means shorter than this fraction of the means themselves is rounding error, not a direction."""


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Value):
    """A direction with its raw length, and where in the model it was read.

    It points from harmless to harmful, from compliant to refusing: adding it makes a model refuse.

    Examples:
        >>> mine = Direction(torch.tensor([3.0, 4.0]), layer=2, hook_name="blocks.2.hook_resid_pre")
        >>> mine.norm, mine.unit.tolist()
        (5.0, [0.6, 0.8])
    """

    vector: Float[Tensor, " d_model"]
    """The raw vector; "coefficient 1" adds this."""
    layer: int
    """`l` is the stream entering block `l`; `n_layers` the stream after the last block. Inside a block: the block."""
    hook_name: str
    """The same place in TransformerLens' words; any hook point of a block, with all its heads as one vector."""
    position: int | None = None
    """The prompt position it was read at, counted from the end (−1 is the last), or None."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vector.is_floating_point():
            raise UserError(f"a direction must be a vector of floats, not of {self.vector.dtype}")
        unit_of(self.vector)
        if (named := place_of_hook(self.hook_name)) != self.layer:
            raise UserError(
                f"layer {self.layer} is not {self.hook_name!r}, which is layer {named}: layer l is the stream entering "
                "block l, which is the output of block l - 1"
            )

    @classmethod
    def of(
        cls,
        vector: Any,
        layer: int | None = None,
        *,
        hook_name: str | None = None,
        position: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Direction":
        """A direction of your own: `Direction.of(tensor, layer=12)`.

        Examples:
            >>> Direction.of([3.0, 0.0, 4.0], layer=12)
            Direction(layer 12, norm 5, d_model 3, blocks.12.hook_resid_pre)

        Args:
            vector: `[d_model]` or `[1, d_model]`; a tensor, an array or a list of numbers.
            layer: `l` is the stream entering block `l`, `n_layers` the stream after the last block.
            hook_name: the same in TransformerLens' words; either is enough. Any hook point of a block will do: a vector
                of `blocks.3.attn.hook_z` has all heads, one after the other.
            position: the prompt position it was read at, counted from the end (−1 is the last).

        Raises:
            UserError: it is no vector of finite floats, zero, or its place is not said, or said in two ways.
        """
        if isinstance(vector, Direction):
            raise UserError(
                "this is a direction already; its vector at another place: Direction.of(direction.vector, ...)"
            )
        row = one_vector(vector)
        if layer is None and hook_name is None:
            raise UserError("say at which layer the direction was read: Direction.of(vector, layer=12)")
        if position is not None and position >= 0:
            raise UserError(f"a position counts from the end of the prompt, -1 is the last token; not {position}")
        place = place_of_hook(hook_name) if layer is None and hook_name is not None else layer
        if place is None or place < 0:
            raise UserError(f"layers count from 0, not {layer}")
        hook_name = block_hook(place, "hook_resid_pre") if hook_name is None else hook_name
        return cls(row, place, hook_name, position, dict(provenance or {}))

    def __repr__(self) -> str:
        place = f"layer {self.layer}" + ("" if self.position is None else f", position {self.position}")
        return f"Direction({place}, norm {self.norm:.4g}, d_model {len(self.vector)}, {self.hook_name})"

    def _repr_html_(self) -> None:
        """One line of text says it."""

    @property
    def norm(self) -> float:
        """The raw length, in units of the residual stream."""
        return self.vector.double().norm().item()

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The float64 unit vector."""
        return unit_of(self.vector)

    @property
    def is_in_stream(self) -> bool:
        """Whether it is a direction of the residual stream, and not of what heads or neurons hold."""
        return is_in_stream(self.hook_name)

    def of_head(self, head: int, n_heads: int) -> "Direction":
        """The part of one head, zero elsewhere, of a direction read where heads are apart (`attn.hook_z`, `hook_v`).

        Examples:
            >>> Direction.of([1.0, 2.0, 3.0, 4.0], hook_name="blocks.1.attn.hook_z").of_head(1, 2).vector
            tensor([0., 0., 3., 4.])

        Args:
            n_heads: at that hook point: of `hook_k` and `hook_v` there may be fewer than of `hook_z`.

        Raises:
            UserError: there is no such head, or the vector does not split into so many.
        """
        if not 0 <= head < n_heads or len(self.vector) % n_heads or self.is_in_stream:
            raise UserError(f"no head {head} of {n_heads} in a vector of width {len(self.vector)} of {self.hook_name}")
        part = torch.zeros_like(self.vector)
        width = len(self.vector) // n_heads
        part[head * width : (head + 1) * width] = self.vector[head * width : (head + 1) * width]
        return Direction(part, self.layer, self.hook_name, self.position, {**self.provenance, "head": head})

    def random_like(self, seed: int) -> "Direction":
        """A random direction of the same norm, place and dtype: the control for every effect of this one.

        Examples:
            >>> direction.random_like(seed=0).norm == pytest.approx(direction.norm)
            True
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.vector.shape, generator=generator, dtype=torch.float64)
        vector = (noise * (self.norm / noise.norm())).to(self.vector.dtype)
        return Direction(vector, self.layer, self.hook_name, self.position, {"method": "random", "seed": seed})

    def save(self, path: str | Path) -> None:
        """Write `path` (.pt, .safetensors or .npy: one vector) and a JSON beside it with the place and provenance.

        Raises:
            UserError: the name ends otherwise.
        """
        path = at_home(path)
        write_vector(path, self.vector)
        write_json(path.with_name(f"{path.stem}_metadata.json"), self.describe())

    def describe(self) -> dict[str, Any]:
        """Position, layer, hook point, norm and provenance as JSON values."""
        place = {"pos": self.position, "layer": self.layer, "hook_name": self.hook_name, "norm": self.norm}
        return {**place, **self.provenance}

    @classmethod
    def load(cls, path: str | Path, layer: int | None = None) -> "Direction":
        """Read a run folder's direction, what `save` wrote, a published `direction.pt`, or a bare vector.

        Args:
            path: a run folder, or a `.pt`, `.safetensors`, `.npy` or `.npz` file, or llama.cpp's control vector
                (`.gguf`). Of a file of vectors by layer (3, "3", "layer_3", a hook point) `layer` chooses one.
            layer: where a vector was read that has no JSON beside it, and no name that says it.

        Raises:
            UserError: a file is missing or does not hold one vector, or its place is not known or said in two ways.
        """
        path = at_home(path)
        if path.is_dir():
            if not (path / FILE).is_file():
                raise UserError(f"{path} has no {FILE}: its run is not finished, or chose none")
            path = path / FILE
        beside = path.with_name(f"{path.stem}_metadata.json")
        if not beside.exists():
            tensors = read_tensors(path)
            held = floats(path, at_layer(path, tensors, layer))
            if held.squeeze().ndim != 1:
                raise UserError(f"{path} does not hold one vector of shape [d_model]")
            layer = layer_by_name(tensors) if layer is None else layer
            if layer is None:
                raise UserError(
                    f"nothing beside {path} says where it was read: expected {beside.name} with its layer, as "
                    "refusal-mi run and Direction.save write it, or Direction.load(path, layer=12)"
                )
            return cls.of(held.squeeze(), layer, provenance={"source": str(path)})
        vector = read_floats(path)
        if vector.squeeze().ndim != 1:
            raise UserError(f"{path} does not hold one vector of shape [d_model]")
        placed = cls._beside(path, vector.squeeze().clone(), beside)
        if layer not in (None, placed.layer):
            raise UserError(f"{path} says itself where it was read, layer {placed.layer}: leave layer {layer} out")
        return placed

    @classmethod
    def _beside(cls, path: Path, vector: Float[Tensor, " d_model"], beside: Path) -> "Direction":
        metadata = read_json(beside)
        if not isinstance(metadata, dict) or "layer" not in metadata:
            raise UserError(f"{beside.name} beside {path} does not say which layer it was read at")
        layer, position, norm = (metadata.pop(key, None) for key in ("layer", "pos", "norm"))
        hook_name = metadata.pop("hook_name", None)
        if not is_whole(layer) or layer < 0 or not (position is None or is_whole(position)):
            raise UserError(f"{beside}: layer and pos must be whole numbers, not {layer!r} and {position!r}")
        if position is not None and position >= 0:
            raise UserError(f"{beside}: pos counts from the end of the prompt, -1 is the last token; found {position}")
        if hook_name is None:
            hook_name = block_hook(layer, "hook_resid_pre")
        if not isinstance(hook_name, str) or place_of_hook(hook_name) != layer:
            raise UserError(f"{beside} contradicts itself: layer {layer} is not {hook_name!r}")
        found = cls(vector, layer, hook_name, position, metadata)
        is_number = isinstance(norm, float | int) and abs(norm) < 1e30
        if norm is not None and not (is_number and math.isclose(norm, found.norm, rel_tol=0.01)):
            raise UserError(f"{beside} names the norm {norm!r}, and the vector in {path.name} has {found.norm:.4g}")
        return found


@dataclass(frozen=True, eq=False, repr=False)
class DirectionGrid(Value):
    """One candidate direction per post-instruction position and layer.

    Examples:
        >>> grid.vectors.shape == (len(grid.positions), grid.n_layers, model.cfg.d_model)
        True
        >>> grid.direction(-1, 3).layer
        3
    """

    vectors: Float[Tensor, "pos layer d_model"]
    """Raw differences of means, float64; layer `l` is the stream entering block `l`, `l = 0..n_layers-1`."""
    positions: tuple[int, ...]
    """Prompt positions of the first axis, counted from the end: −n .. −1."""
    is_degenerate: tuple[tuple[bool, ...], ...]
    """`[pos][layer]`: the two means are the same up to rounding, so there is no direction."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    hook_name: str | None = None
    """Of vectors that were read at one hook point, the only layer of their second axis."""

    def __post_init__(self) -> None:
        if self.vectors.shape[0] != len(self.positions) or not bool(torch.isfinite(self.vectors).all()):
            raise UserError(f"a grid needs finite vectors for {len(self.positions)} positions")
        if self.hook_name is not None and self.vectors.shape[1] != 1:
            raise UserError(f"a grid of {self.hook_name} has one layer, not {self.vectors.shape[1]}")

    @classmethod
    def of(cls, direction: Direction, positions: Iterable[int], n_layers: int) -> "DirectionGrid":
        """One candidate at its own place, or at the last position if it has none: what makes a search of one.

        Args:
            positions: those of `chat.positions`.
            n_layers: of the model.

        Raises:
            UserError: there is no such place among them, or it was not read in the stream between two blocks.
        """
        check_between_blocks(direction)
        places = tuple(positions)
        position = -1 if direction.position is None else direction.position
        if position not in places or not direction.layer < n_layers:
            raise UserError(
                f"a grid of positions {list(places)} and layers 0..{n_layers - 1} has no place for a direction of "
                f"position {position}, layer {direction.layer}"
            )
        vectors = torch.zeros(len(places), n_layers, len(direction.vector), dtype=torch.float64)
        vectors[places.index(position), direction.layer] = direction.vector.detach().cpu().double()
        return cls(vectors, places, tuple(map(tuple, (~vectors.any(-1)).tolist())), dict(direction.provenance))

    @property
    def n_layers(self) -> int:
        return self.vectors.shape[1]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the second axis."""
        return tuple(range(self.n_layers)) if self.hook_name is None else (place_of_hook(self.hook_name),)

    @property
    def _title(self) -> str:
        n, n_layers, width = self.vectors.shape
        places = f"{n} positions {self.positions[0]}..{self.positions[-1]}" if n else "no positions"
        if self.hook_name is not None:
            return f"DirectionGrid: {places} of {self.hook_name}, width {width}"
        return f"DirectionGrid: {places} × {n_layers} layers × d_model {width}"

    def _longest(self) -> list[tuple[str, ...]]:
        norms = {
            place: self.vectors[row // self.n_layers, row % self.n_layers].norm().item()
            for row, place in enumerate(self.candidates())
        }
        best = sorted(norms, key=lambda place: -norms[place])[:N_SHOWN]
        return [(f"{position}", f"{layer}", f"{norms[position, layer]:.4g}") for position, layer in best]

    def __repr__(self) -> str:
        return text_table(self._title, _LONGEST, self._longest())

    def _repr_html_(self) -> str:
        return html_table(self._title, _LONGEST, self._longest())

    def to_frame(self) -> Any:
        """A pandas table with a row for each candidate: position, layer, norm, is_degenerate.

        Raises:
            UserError: pandas is not installed.
        """
        flags = [flag for row in self.is_degenerate for flag in row]
        norms = self.vectors.norm(dim=-1).flatten().tolist()
        rows = zip(self.candidates(), norms, flags, strict=True)
        return frame(
            [
                {"position": place[0], "layer": place[1], "norm": norm, "is_degenerate": flag}
                for place, norm, flag in rows
            ]
        )

    def direction(self, position: int, layer: int | None = None) -> Direction:
        """The candidate at a position (−n .. −1) and layer; of one hook point there is only its own.

        Examples:
            >>> grid.direction(position=-1, layer=2).hook_name
            'blocks.2.hook_resid_pre'

        Raises:
            UserError: there is no such candidate, or its means do not differ.
        """
        if layer is None and self.hook_name is not None:
            (layer,) = self.layers
        if layer is None:
            raise UserError(f"say at which layer: grid.direction({position}, layer), 0..{self.n_layers - 1}")
        if position not in self.positions or layer not in self.layers:
            raise UserError(
                f"no candidate at position {position}, layer {layer}: positions are "
                f"{self.positions[0]}..{self.positions[-1]}, "
                + (f"layers 0..{self.n_layers - 1}" if self.hook_name is None else f"of {self.hook_name} alone")
            )
        row, column = self.positions.index(position), self.layers.index(layer)
        if self.is_degenerate[row][column]:
            raise UserError(f"the means at position {position}, layer {layer} do not differ: there is no direction")
        vector = self.vectors[row, column].float()
        place = resid_hook(layer, self.n_layers) if self.hook_name is None else self.hook_name
        return Direction(vector, layer, place, position, self.provenance)

    def candidates(self) -> list[tuple[int, int]]:
        """Every (position, layer), in the published order."""
        return [(position, layer) for position in self.positions for layer in self.layers]

    def check_all_layers(self) -> None:
        """Refuse a grid of one hook point, where every layer of the stream is searched or saved.

        Raises:
            UserError: it is one.
        """
        if self.hook_name is not None:
            raise UserError(
                f"this grid is of {self.hook_name} alone, and every layer of the stream is wanted: use "
                "grid.direction(position), or mean_activations without hook="
            )

    def save(self, path: str | Path) -> None:
        """Write a `mean_diffs.pt`, `[n_pos, n_layers, d_model]` in float64, which `load` reads.

        Raises:
            UserError: it is of one hook point, which such a file does not say.
        """
        self.check_all_layers()
        write_tensors(at_home(path), self.vectors)

    @classmethod
    def load(cls, path: str | Path) -> "DirectionGrid":
        """Read a `mean_diffs.pt` (`[n_pos, n_layers, d_model]`), ours or a published one."""
        vectors = read_floats(at_home(path), None, None, None).double()
        largest = vectors.norm(dim=-1).max()
        degenerate = (vectors.norm(dim=-1) <= MIN_RELATIVE_NORM * largest).tolist()
        return cls(vectors, tuple(range(-len(vectors), 0)), tuple(map(tuple, degenerate)), {"source": str(path)})


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMeans(Value):
    """Mean residual stream over prompts, per post-instruction position and layer.

    Examples:
        >>> means.means.shape == (len(means.positions), model.cfg.n_layers, model.cfg.d_model)
        True
        >>> means.n_prompts == len(harmful)
        True
    """

    means: Float[Tensor, "pos layer d_model"]
    """float64, on the CPU; layer `l` is the stream entering block `l`, `l = 0..n_layers-1`."""
    positions: tuple[int, ...]
    n_prompts: int
    hook_name: str | None = None
    """Of what was read at one hook point, the only layer of the second axis; as wide as that point, heads in a row."""

    @classmethod
    def from_cache(cls, cache: Any, positions: Iterable[int] = (-1,), *, hook: str | None = None) -> "ActivationMeans":
        """Of the cache of TransformerLens' `run_with_cache`, over its prompts, which are padded on the left if at all.

        Examples:
            >>> _, cache = model.run_with_cache(chat.batch("Hi").tokens)
            >>> ActivationMeans.from_cache(cache, chat.positions).means.shape == means.means.shape
            True

        Args:
            cache: an `ActivationCache`, or a dict, with `blocks.{l}.hook_resid_pre` of every block.
            positions: counted from the end of the prompts; those of `chat.positions` fit `mean_activations`.
            hook: of this hook point of a block instead, as `mean_activations(…, hook=)` gives it.

        Raises:
            UserError: a block is missing, or there is no such position.
        """
        if hook is not None:
            place_of_hook(hook)
            if hook not in cache:
                raise UserError(f"the cache has no {hook}: names_filter={hook!r} keeps it")
        names = {int(match[1]): name for name in cache if (match := _RESID_PRE.fullmatch(str(name)))}
        if hook is None and (not names or sorted(names) != list(range(len(names)))):
            raise UserError(
                "the cache needs blocks.{l}.hook_resid_pre of every block l = 0..n_layers-1, and has those of "
                f"{', '.join(map(str, sorted(names))) or 'none'}"
            )
        streams = [cache[name] for name in ([names[layer] for layer in range(len(names))] if hook is None else [hook])]
        is_one = not getattr(cache, "has_batch_dim", True)  # of an ActivationCache without its first axis
        streams = [(stream[None] if is_one or stream.ndim == 2 else stream).flatten(2) for stream in streams]
        wanted, width = tuple(positions), streams[0].shape[1]
        if not wanted or not all(-width <= position < 0 for position in wanted):
            raise UserError(f"positions count from the end, -{width}..-1 here, not {list(wanted)}")
        means = [with_float64(stream[:, list(wanted)]).mean(0, dtype=torch.float64).cpu() for stream in streams]
        return cls(torch.stack(means, dim=1), wanted, len(streams[0]), hook)


@runtime_checkable
class Estimator(Protocol):
    """Activations of two classes -> candidate directions. Any function of this shape can take its place.

    Examples:
        >>> estimator: Estimator = difference_in_means
        >>> estimator(means, other_means) == grid
        True
    """

    def __call__(self, harmful: ActivationMeans, harmless: ActivationMeans) -> DirectionGrid: ...


def difference_in_means(harmful: ActivationMeans, harmless: ActivationMeans) -> DirectionGrid:
    """r[i, l] = mean over harmful prompts − mean over harmless prompts (Arditi et al. 2024, section 2.3).

    Examples:
        >>> difference_in_means(means, other_means).direction(-1, 2).layer
        2
    """
    is_same = (harmful.positions, harmful.hook_name) == (harmless.positions, harmless.hook_name)
    if not is_same or harmful.means.shape != harmless.means.shape:
        raise ValueError("the two classes were read at different positions or layers")
    vectors = harmful.means - harmless.means
    scale = torch.maximum(harmful.means.norm(dim=-1), harmless.means.norm(dim=-1))
    degenerate = (vectors.norm(dim=-1) <= MIN_RELATIVE_NORM * scale).tolist()
    counts = {"method": "difference in means", "n_harmful": harmful.n_prompts, "n_harmless": harmless.n_prompts}
    return DirectionGrid(vectors, harmful.positions, tuple(map(tuple, degenerate)), counts, harmful.hook_name)


def check_between_blocks(direction: Direction) -> None:
    """Refuse a direction of another place than the stream that enters or leaves a block, which a layer is.

    Raises:
        UserError: it is one.
    """
    if not is_between_blocks(direction.hook_name):
        raise UserError(
            f"this direction was read at {direction.hook_name}; wanted here is one of the stream that enters a block"
        )


def check_in_stream(direction: Direction) -> None:
    """Refuse a direction of what heads or neurons hold, where one of the residual stream is meant.

    Raises:
        UserError: it is one.
    """
    if not direction.is_in_stream:
        raise UserError(
            f"this direction was read at {direction.hook_name}, and one of the residual stream is wanted here: it can "
            "be added and ablated at its own hook point alone"
        )


def cosine(a: Direction, b: Direction) -> float:
    """Cosine similarity of two directions, in float64.

    Examples:
        >>> round(cosine(direction, direction), 6)
        1.0
    """
    return math.fsum((a.unit * b.unit).tolist())


def load_vector(
    path: str | Path, n_layers: int, layer: int | None = None, *, hook: str | None = None
) -> Direction | Tensor:
    """`load_direction` for ablation, which does not ask where a vector was read: where nothing says it, it is bare."""
    path = at_home(path)
    is_said = (
        layer is not None
        or hook is not None
        or path.with_name(f"{path.stem}_metadata.json").exists()
        or _CAA_NAME.fullmatch(path.stem)
    )
    if not is_said and path.is_file() and not path.with_name("run.json").exists():
        held = read_tensors(path)
        rows = read_vectors(path).rows
        if len(rows) == 1 and layer_by_name(held) is None:
            return rows[0].float()
    return load_direction(path, n_layers, layer, hook=hook)


def load_direction(
    path: str | Path, n_layers: int, layer: int | None = None, *, moves: bool = False, hook: str | None = None
) -> Direction:
    """One vector of a file with its place: the one rule of every command that takes a file.

    A JSON beside the file says where the vector was read. Of a file of n_layers + 1 rows, one per layer, `layer`
    chooses the row, and of vectors by layer the one that is named so; a control vector of llama.cpp (`.gguf`) names
    its layers. A bare vector was read where `layer` says, which must agree with a name that says it too: CAA calls the
    output of block L, our layer L + 1, `vec_layer_{L}_{model}.pt`.

    Examples:
        >>> direction.save("mine.pt")
        >>> load_direction("mine.pt", model.cfg.n_layers) == direction
        True

    Args:
        n_layers: of the model that it is used in.
        layer: `l` is the stream entering block `l`; `n_layers` the stream after the last block.
        moves: whether `layer` may be another one than the JSON says: an addition may act elsewhere.
        hook: the hook point where the vector was read, any of a block; `layer` then may only agree, or, where it
            moves, is left to the addition.

    Raises:
        UserError: the place is not known, does not exist or is said in two ways, or the file holds something else.
    """
    path = at_home(path)
    if hook is not None:
        layer, moves = _read_at(hook, layer, moves=moves), False
    if layer is not None:
        resid_hook(layer, n_layers)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    named = _CAA_NAME.fullmatch(path.stem)
    if path.with_name(f"{path.stem}_metadata.json").exists():
        found = Direction.load(path)
        if named is not None and found.layer != (said := stream_after(int(named[1]))):
            raise UserError(
                f"{path} is named as CAA names the output of block {named[1]}, our layer {said}, and the JSON beside "
                f"it says layer {found.layer}: rename it, or correct the JSON"
            )
        if found.layer > n_layers:
            raise UserError(f"{path} was read at layer {found.layer}, and this model has layers 0..{n_layers}")
        if not moves and layer not in (None, found.layer):
            raise UserError(f"{path} says itself where it was read, layer {found.layer}: leave layer {layer} out")
        if hook not in (None, found.hook_name) and not all(map(is_between_blocks, (hook, found.hook_name))):
            raise UserError(f"{path} says itself where it was read, {found.hook_name}: leave {hook} out")
        return found
    tensors = read_tensors(path)
    inside = None if hook is None or is_between_blocks(hook) else hook
    rows = vectors_in(path, at_layer(path, tensors, layer if inside is None else None)).rows
    by_name = layer_by_name(tensors)
    if inside is not None and (len(rows) > 1 or named is not None or by_name is not None):
        raise UserError(f"{path} is of the stream between blocks, by its name or a row for each layer, not of {inside}")
    if len(rows) > 1:
        if len(rows) != n_layers + 1:
            raise UserError(
                f"{path} holds {len(rows)} vectors: expected one, or one for each of the layers 0..{n_layers}, row l "
                "the stream entering block l"
            )
        if layer is None:
            raise UserError(f"{path} holds {len(rows)} vectors, one per layer: choose one with --layer")
        rows = rows[layer : layer + 1]
    elif named is not None:
        said = stream_after(int(named[1]))
        if layer not in (None, said):
            raise UserError(
                f"{path} is named as CAA names the output of block {named[1]}, our layer {said}, not {layer} "
                f"(the output of block {layer - 1})"
            )
        layer = said
    elif layer is None and by_name is not None:
        layer = by_name
    elif layer is None:
        raise UserError(f"nothing beside {path} says where the vector was read: say with --layer at which layer")
    if not rows[0].any():
        raise UserError(f"{path} holds only zeros for layer {layer}: there is no direction")
    place = resid_hook(layer, n_layers) if inside is None else inside
    record = path.with_name("run.json")
    made = {"model": read_record(record, _Beside).model} if record.exists() else {}
    return Direction(rows[0].float(), layer, place, None, {"source": str(path), **made})


def _read_at(hook: str, layer: int | None, *, moves: bool) -> int:
    """The layer of a hook point, which another one that is said must not contradict."""
    place = place_of_hook(hook)
    if not moves and layer not in (None, place):
        raise UserError(f"layer {layer} is not {hook!r}, which is layer {place}: either is enough")
    return place


_CAA_NAME = re.compile(r"vec_layer_(\d{1,9})_.+", re.DOTALL)


@dataclass(frozen=True, eq=False, repr=False)
class _Beside(Value):
    """Of the `run.json` of the folder that a vector lies in."""

    model: dict[str, Any] | None = None


def layer_rows(path: Path, n_layers: int) -> Float[Tensor, "layer d_model"]:
    """All rows of a file of one vector per layer 0..n_layers, such as a `refusal_vector.pt`.

    Raises:
        UserError: it has another shape.
    """
    rows = read_floats(path)
    if rows.ndim != 2 or len(rows) != n_layers + 1:
        raise UserError(
            f"{path} must hold [n_layers + 1, d_model] = [{n_layers + 1}, ...], row l the stream entering block l; "
            f"found {list(rows.shape)} (with only n_layers rows it is unclear which end is missing: rewrite it with "
            "the embedding row, or make it again with refusal-mi responses extract)"
        )
    return rows.float()
