"""Estimators that see single prompts: what they are given, how they say so, and one vector for each place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import MIN_RELATIVE_NORM, ActivationMeans, DirectionGrid
from ..errors import UserError
from ..model.points import place_of_hook
from ..progress import track
from ..values import Value

Rows = Float[Tensor, "prompt d_model"]
"""The activations of one class at one position and layer, float64."""
PlaceEstimator = Callable[[Tensor, Tensor], Tensor]
"""Rows of harmful and of harmless prompts -> a vector, of any length and sign."""


@dataclass(frozen=True, eq=False, repr=False)
class ActivationSamples(Value):
    """The residual stream of every prompt of one class, per post-instruction position and layer.

    Examples:
        >>> samples.prompts.shape == (len(harmful), len(samples.positions), model.cfg.n_layers, model.cfg.d_model)
        True
        >>> samples.at(-1, 2).double().mean(0).allclose(samples.means.means[-1, 2])
        True
    """

    prompts: Float[Tensor, "prompt pos layer d_model"]
    """On the CPU; layer `l` is the stream entering block `l`, `l = 0..n_layers-1`."""
    positions: tuple[int, ...]
    """Of the second axis, counted from the end: −n .. −1."""
    categories: tuple[str | None, ...] = ()
    """Of every prompt; empty where nothing said them."""
    hook_name: str | None = None
    """Of what was read at one hook point, the only layer of the third axis; as wide as that point, heads in a row."""

    def __post_init__(self) -> None:
        if self.categories and len(self.categories) != len(self.prompts):
            raise UserError(f"{len(self.categories)} categories were given for {len(self.prompts)} prompts")
        if self.prompts.shape[1] != len(self.positions) or not len(self.prompts):
            raise UserError(
                f"activations of shape {list(self.prompts.shape)} do not fit {len(self.positions)} positions: expected "
                "[prompt pos layer d_model], and at least one prompt"
            )

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def n_layers(self) -> int:
        return self.prompts.shape[2]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the third axis."""
        return tuple(range(self.n_layers)) if self.hook_name is None else (place_of_hook(self.hook_name),)

    @cached_property
    def means(self) -> ActivationMeans:
        """What an estimator that sees means alone is given."""
        means = self.prompts.mean(0, dtype=torch.float64)
        return ActivationMeans(means, self.positions, self.n_prompts, self.hook_name)

    def at(self, position: int, layer: int | None = None) -> Float[Tensor, "prompt d_model"]:
        """The rows of one place, in float64; of one hook point there is only its own layer.

        Raises:
            UserError: nothing was read there.
        """
        if layer is None and self.hook_name is not None:
            (layer,) = self.layers
        if position not in self.positions or layer not in self.layers:
            raise UserError(
                f"nothing was read at position {position}, layer {layer}: positions are {self.positions}, "
                + (f"layers 0..{self.n_layers - 1}" if self.hook_name is None else f"of {self.hook_name} alone")
            )
        return self.prompts[:, self.positions.index(position), self.layers.index(layer)].double()

    def take(self, prompts: Sequence[int]) -> "ActivationSamples":
        """Some of the prompts, such as one category's."""
        return replace(
            self,
            prompts=self.prompts[list(prompts)],
            categories=tuple(self.categories[each] for each in prompts) if self.categories else (),
        )


@runtime_checkable
class SampleEstimator(Protocol):
    """Activations of every prompt of two classes -> candidate directions.

    A function of this shape is marked with `sees_prompts`, which is how it is told from an `Estimator` of means.

    Examples:
        >>> estimator = estimator_named("median")
        >>> needs_prompts(estimator), needs_prompts(difference_in_means)
        (True, False)
        >>> estimator(samples, other_samples).vectors.shape == grid.vectors.shape
        True
    """

    def __call__(self, harmful: ActivationSamples, harmless: ActivationSamples) -> DirectionGrid: ...


Function = TypeVar("Function", bound=Callable[..., Any])


def sees_prompts(function: Function) -> Function:
    """Mark a function as a `SampleEstimator`: it is given `ActivationSamples` instead of `ActivationMeans`.

    Examples:
        >>> @sees_prompts
        ... def medians(harmful, harmless):
        ...     return estimator_named("median")(harmful, harmless)
        >>> needs_prompts(medians)
        True
    """
    setattr(function, "sees_prompts", True)  # noqa: B010 - a function has no such attribute for the type checker
    return function


def needs_prompts(estimator: object) -> bool:
    """Whether an estimator is marked with `sees_prompts`."""
    return getattr(estimator, "sees_prompts", False) is True


@dataclass(frozen=True, eq=False, repr=False)
class EveryPlace(Value):
    """A `SampleEstimator` from a function of the rows of one position and layer.

    The vector v that the function gives becomes (v̂ · δ) v̂, with v̂ = v/‖v‖ and δ the difference of the class means:
    it points from harmless to harmful, whatever its sign was, and adding it once moves the mean of the harmless
    prompts onto that of the harmful ones along v̂. Of the difference of means itself nothing changes.

    Where the means do not differ, or v̂ is orthogonal to their difference, there is no direction.
    """

    function: PlaceEstimator
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the provenance says beside the method."""
    sees_prompts: bool = field(default=True, init=False)

    def __call__(self, harmful: ActivationSamples, harmless: ActivationSamples) -> DirectionGrid:
        check_fit(harmful, harmless)
        n_positions, n_layers = harmful.prompts.shape[1:3]
        vectors = torch.zeros(harmful.prompts.shape[1:], dtype=torch.float64)
        places = [(row, layer) for row in range(n_positions) for layer in range(n_layers)]
        for row, layer in track(places, f"estimating directions ({self.method})"):
            rows = (each.prompts[:, row, layer].double() for each in (harmful, harmless))
            vectors[row, layer] = at_one_place(self.function, *rows)
        is_degenerate = tuple(map(tuple, (~vectors.any(-1)).tolist()))
        counts = {"n_harmful": harmful.n_prompts, "n_harmless": harmless.n_prompts}
        return DirectionGrid(
            vectors,
            harmful.positions,
            is_degenerate,
            {"method": self.method, **self.settings, **counts},
            harmful.hook_name,
        )


def at_one_place(
    function: PlaceEstimator, harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"]
) -> Float[Tensor, " d_model"]:
    """The function's vector in the length and sign of `EveryPlace`; zero where there is no direction."""
    means = harmful.mean(0), harmless.mean(0)
    difference = means[0] - means[1]
    smallest = MIN_RELATIVE_NORM * max(mean.norm().item() for mean in means)
    if difference.norm() <= smallest:
        return torch.zeros_like(difference)
    return along(function(harmful, harmless), difference, smallest)


def along(
    vector: Float[Tensor, " d_model"], difference: Float[Tensor, " d_model"], smallest: float = 0.0
) -> Float[Tensor, " d_model"]:
    """(v̂ · δ) v̂: the vector's line with the length and sign of the class difference on it.

    Args:
        smallest: a length that counts as zero, beside rounding errors of the difference itself.
    """
    norm = vector.norm()
    if norm == 0:
        return torch.zeros_like(difference)
    unit = vector / norm
    length = unit @ difference
    if length.abs() <= max(smallest, MIN_RELATIVE_NORM * difference.norm().item()):
        return torch.zeros_like(difference)
    return length * unit


def check_fit(harmful: ActivationSamples, harmless: ActivationSamples) -> None:
    """Both classes were read at the same places.

    Raises:
        UserError: they were not.
    """
    is_same = (harmful.positions, harmful.hook_name) == (harmless.positions, harmless.hook_name)
    if not is_same or harmful.prompts.shape[1:] != harmless.prompts.shape[1:]:
        raise UserError(
            "the two classes were read at different positions or layers: read both with the same ChatFormat"
        )
