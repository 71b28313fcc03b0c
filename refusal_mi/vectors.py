"""Vectors as they come, in arrays and files of one or several: read, compared, given one norm."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .files import at_home, floats, read_tensors
from .model.points import layer_of_hook
from .values import Value


def one_vector(given: Any) -> Float[Tensor, " d_model"]:
    """One vector of a tensor, an array or a list of numbers, `[d_model]` or `[1, d_model]`, in a storage of its own.

    Raises:
        UserError: it is something else.
    """
    if isinstance(given, str | Path):
        raise UserError(f"a direction is a vector of numbers, not a path: Direction.load({str(given)!r}) reads one")
    kind = torch.get_default_dtype() if isinstance(given, list | tuple) else None  # of whole numbers too
    try:
        held = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=kind)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a direction is a vector of numbers, not {type(given).__name__}: {error}") from None
    if held.ndim == 2 and len(held) == 1:
        held = held[0]
    if held.ndim != 1 or held.numel() == 0:
        raise UserError(f"a direction is one vector of shape [d_model], not {list(held.shape)}")
    if not held.is_floating_point():
        raise UserError(f"a direction must be a vector of floats, not of {held.dtype}")
    return held.detach().clone()


def unit_of(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The float64 unit vector, on the CPU.

    Examples:
        >>> unit_of(torch.tensor([3.0, 4.0])).tolist()
        [0.6, 0.8]

    Raises:
        UserError: it is zero, or holds NaN or infinity.
    """
    if not bool(torch.isfinite(vector).all()):
        raise UserError("a direction must be finite: this one holds NaN or infinity")
    double = vector.detach().cpu().double()
    norm = double.norm()
    if norm == 0:
        raise UserError("a direction must not be zero")
    return double / norm


def at_layer(path: Path, held: Any, layer: int | None) -> Any:
    """Of tensors by name or layer, the only one or the one of this layer; anything else as it is.

    Raises:
        UserError: none is of this layer, or none is asked for.
    """
    if not isinstance(held, dict):
        return held
    if len(held) == 1:
        ((name, only),) = held.items()
        if layer is not None and _layer_of_name(name) not in (None, layer):
            raise UserError(
                f"{path} holds one tensor, of layer {_layer_of_name(name)} by its name {name!r}, not {layer}"
            )
        return only if isinstance(only, Tensor) else held
    names = ", ".join(map(str, list(held)[:6])) + (", ..." if len(held) > 6 else "")
    if layer is None:
        raise UserError(f"{path} holds {len(held)} tensors ({names}): choose one with the layer (--layer)")
    found = [value for name, value in held.items() if _layer_of_name(name) == layer]
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} tensors of layer {layer}; it has {names}")
    return found[0]


def layer_by_name(held: Any) -> int | None:
    """The layer that the name of a file's only tensor says."""
    return _layer_of_name(next(iter(held))) if isinstance(held, dict) and len(held) == 1 else None


def _layer_of_name(name: object) -> int | None:
    """3, "3", "layer_3" and points of the stream between blocks."""
    if is_whole(name):
        return int(str(name))
    text = str(name)
    if match := re.fullmatch(r"(?:layers?[._ -]?)?(\d{1,9})", text):
        return int(match[1])
    return layer_of_hook(text) if re.fullmatch(r"blocks\.\d{1,9}\.hook_resid_(pre|post)", text) else None


def is_whole(value: object) -> bool:
    """Whether this is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False, repr=False)
class LabelledVectors(Value):
    """The vectors of one file.

    Examples:
        >>> LabelledVectors("mine", torch.eye(2)).labels
        ['mine[0]', 'mine[1]']
    """

    name: str
    rows: Float[Tensor, "row d_model"]
    """float64."""
    names: tuple[str, ...] = ()
    """Of the rows, where the file names them."""

    @property
    def labels(self) -> list[str]:
        """The file's name, with the row where there are several."""
        if len(self.rows) == 1:
            return [self.name]
        return [f"{self.name}[{row}]" for row in (self.names or range(len(self.rows)))]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Value):
    """Cosines of every vector with every other.

    Examples:
        >>> direction.save("mine.pt")
        >>> compare([read_vectors("mine.pt"), read_vectors("mine.pt")]).cosines.round(decimals=5).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    labels: tuple[str, ...]
    cosines: Float[Tensor, "vector vector"]
    """float64; NaN where a vector is zero."""
    norms: Float[Tensor, " vector"]
    """Raw lengths, in units of the residual stream."""

    def describe(self) -> dict[str, Any]:
        """JSON values, None for NaN."""
        cosines = [[None if value != value else value for value in row] for row in self.cosines.tolist()]
        return {"labels": list(self.labels), "cosines": cosines, "norms": self.norms.tolist()}


def read_vectors(path: str | Path) -> LabelledVectors:
    """The vectors of a file: `[d]`, `[1, d]`, `[n, d]`, a list of vectors, or vectors by layer, in any float type.

    Examples:
        >>> direction.save("mine.pt")
        >>> read_vectors("mine.pt").labels
        ['mine']

    Raises:
        UserError: it holds something else, or numbers that are not finite.
    """
    path = at_home(path)
    held = read_tensors(path)
    if isinstance(held, dict) and len(held) > 1:
        layers = {name: _layer_of_name(name) for name in held}
        if None not in layers.values() and len(set(layers.values())) == len(layers):
            by_layer = sorted(held, key=lambda name: layers[name] or 0)
            return vectors_in(
                path, [held[name] for name in by_layer], tuple(f"layer {layers[name]}" for name in by_layer)
            )
    return vectors_in(path, at_layer(path, held, None))


def vectors_in(path: Path, held: Any, names: tuple[str, ...] = ()) -> LabelledVectors:
    """What a file holds, if it is vectors as `read_vectors` takes them.

    Raises:
        UserError: it is something else, or numbers that are not finite.
    """
    if isinstance(held, list) and held and all(isinstance(item, Tensor) for item in held):
        if len({item.numel() for item in held}) != 1 or any(
            item.numel() != max(item.shape, default=0) for item in held
        ):
            raise UserError(f"{path} holds a list of tensors of different shapes, not of vectors of one width")
        held = torch.stack([floats(path, item).reshape(-1) for item in held])
    held = floats(path, held)
    if held.ndim not in (1, 2) or held.numel() == 0:
        raise UserError(
            f"{path} holds {held.dtype} of shape {list(held.shape)}; expected floats of shape [d], [1, d] or [n, d]"
        )
    rows = held.reshape(-1, held.shape[-1]).double()
    if not bool(torch.isfinite(rows).all()):
        raise UserError(f"{path} holds numbers that are not finite")
    if not bool(rows.any()):
        raise UserError(f"{path} holds zeros only, which have no direction")
    return LabelledVectors(path.stem, rows, names)


def compare(stacks: list[LabelledVectors]) -> Comparison:
    """Cosine similarity of all vectors of all stacks, in float64.

    Examples:
        >>> direction.save("mine.pt")
        >>> compare([read_vectors("mine.pt"), read_vectors("mine.pt")]).labels
        ('mine', 'mine')

    Raises:
        UserError: there are fewer than two vectors, or they have different widths.
    """
    widths = {stack.rows.shape[-1]: stack.name for stack in stacks}
    if len(widths) > 1:
        listed = ", ".join(f"{name} has {width}" for width, name in widths.items())
        raise UserError(f"vectors of different widths cannot be compared: {listed}; they come from different models")
    if sum(len(stack.rows) for stack in stacks) < 2:
        raise UserError("a comparison needs at least two vectors")
    rows = torch.cat([stack.rows for stack in stacks])
    norms = rows.norm(dim=-1)
    units = rows / norms[:, None]
    return Comparison(tuple(label for stack in stacks for label in stack.labels), units @ units.T, norms)


def normalize_across(stacks: list[LabelledVectors]) -> list[LabelledVectors]:
    """Give the stacks one norm per row: v_b ← v_b · (mean over b of ‖v_b‖) / ‖v_b‖ (Rimsky et al. 2024).

    Raises:
        UserError: the stacks have different shapes, or a vector is zero.
    """
    shapes = {tuple(stack.rows.shape) for stack in stacks}
    if len(stacks) < 2 or len(shapes) > 1:
        raise UserError(f"a shared norm needs two or more files of one shape, not {sorted(shapes)}")
    norms = torch.stack([stack.rows.norm(dim=-1) for stack in stacks])
    if not bool(norms.all()):
        raise UserError("a vector of length 0 cannot be given a norm")
    shared = norms.mean(dim=0)
    return [
        replace(stack, rows=stack.rows * (shared / norm)[:, None]) for stack, norm in zip(stacks, norms, strict=True)
    ]
