"""What is done to the residual stream, as objects: one object means the same thing as hooks and as edited weights."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .directions import ActivationMeans, Direction, DirectionGrid, check_in_stream
from .errors import UserError
from .estimators.erasure import Eraser, fit_eraser
from .estimators.linear import Shrinkage
from .estimators.samples import ActivationSamples
from .model.points import (
    Component,
    Hook,
    HookedModel,
    HookFn,
    check_point,
    check_raw_basis,
    is_between_blocks,
    place_of_hook,
    resid_hook,
    write_hooks,
)
from .options import Positions as Positions
from .values import Value, check_named
from .vectors import one_vector, unit_of

NEAR_DUPLICATE, NEARLY_DEPENDENT = 1e-3, 0.1
"""Relative singular values of the unit directions below which a span is refused, or warned about."""
LONGEST = 1e18
"""Of what is added: a norm's sum of squares overflows in float32 at about 1.8e19."""
Change = Callable[[Tensor], Tensor]
PromptWidth = int | Int[Tensor, " batch"] | None
"""Columns of a left-padded batch that are prompt, for all rows or each; None: all of them."""


@runtime_checkable
class Intervention(Protocol):
    """Anything that can say which function runs at which hook point."""

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]: ...


@runtime_checkable
class KeepsRows(Protocol):
    """A hook that remembers something of every row of its batch, and is told which rows go on where others end."""

    def keep_rows_(self, rows: Int[Tensor, " kept"]) -> None: ...


Interventions = Intervention | Iterable[Intervention]
"""One, or several in the order in which they act."""


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Value):
    """Remove a direction, or the span of several, from what is written into the stream.

    x ← x − strength · Q Qᵀ x at the token embedding, every attention output and every MLP output, Q an orthonormal
    basis of the directions. At strength 1 over all layers nothing of the direction is left anywhere in the stream
    (Arditi et al. 2024, section 2.4). A list of several `Ablate` is not the same: one after the other, the later
    projections put back part of what the earlier ones removed, unless the directions are orthogonal. `AblateInTurn`
    is the published form of that.

    Examples:
        >>> len(Ablate(direction).hooks(model)) == 1 + 2 * model.cfg.n_layers
        True
    """

    directions: Direction | Iterable[Any]
    """Or bare vectors, tensors, arrays or lists of numbers, `[d_model]` or `[n, d_model]`: ablation does not ask where
    they were read."""
    strength: float = 1.0
    layers: Sequence[int] | None = None
    """Blocks whose writes are changed; None is all. The embedding counts as a write of block 0."""
    components: Sequence[Component] = get_args(Component)
    constants: Sequence[float] | None = None
    """Affine ablation: instead of 0, the component of the stream along each direction (in units of the stream,
    one number per direction) everywhere; written once, with the embedding."""
    positions: Positions = "all"
    hook: str | None = None
    """Instead of all writes, one hook point of a block alone, with all its heads as one vector. None is that of
    directions which were all read at one point outside of the stream, such as `blocks.3.attn.hook_z`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", _each(self.directions))
        check_named("positions", self.positions, get_args(Positions))
        for name in ("layers", "components"):
            if isinstance(one := getattr(self, name), int | str):
                raise UserError(f"{name} takes a list: {name}=[{one!r}]")
        for component in self.components:
            check_named("component", component, get_args(Component))
        check_finite("strength", self.strength)
        for constant in self.constants or ():
            check_finite("constants", constant)
        everywhere = self.layers is None and set(self.components) == set(get_args(Component))
        if self.point is not None and not (everywhere and self.constants is None):
            raise UserError(f"{self.point} is one place: layers, components and constants are about writes")
        whole = self.strength == 1 and everywhere
        if self.constants is not None and not (whole and self.positions == "all"):
            raise UserError("constants need an ablation of all writes at strength 1 and all positions")
        if self.constants is not None and len(self.constants) != len(self.units):
            raise UserError(f"{len(self.constants)} constants were given for {len(self.units)} directions")

    @cached_property
    def units(self) -> Float[Tensor, "direction d_model"]:
        """The float64 unit vectors."""
        units = [each.unit if isinstance(each, Direction) else unit_of(each) for each in self.each]
        if len({len(unit) for unit in units}) != 1:
            widths = ", ".join(str(len(unit)) for unit in units)
            raise UserError(f"directions of different widths cannot be ablated together: {widths}")
        return torch.stack(units)

    @property
    def each(self) -> tuple[Direction | Tensor, ...]:
        """The directions, one as several."""
        single = isinstance(self.directions, Direction | Tensor)
        return (self.directions,) if single else tuple(self.directions)  # type: ignore[return-value, arg-type]

    @cached_property
    def point(self) -> str | None:
        """The hook point that it acts at; None for all writes.

        Raises:
            UserError: there is no such point, or the directions were read at several, outside of the stream.
        """
        read = {each.hook_name for each in self.each if isinstance(each, Direction) and not each.is_in_stream}
        if self.hook is not None:
            place_of_hook(self.hook)
        elif len(read) > 1:
            raise UserError(f"directions of {', '.join(sorted(read))} cannot be ablated together: one Ablate for each")
        elif read and any(isinstance(each, Direction) and each.is_in_stream for each in self.each):
            raise UserError(f"directions of {read.pop()} and of the stream cannot be ablated together")
        return self.hook if self.hook is not None else next(iter(read), None)

    @cached_property
    def basis(self) -> Float[Tensor, "rank d_model"]:
        """Orthonormal float64 basis of the directions' span.

        Raises:
            UserError: two of the directions are all but the same, or more are dependent.
        """
        _, singular_values, rows = torch.linalg.svd(self.units, full_matrices=False)
        relative = (singular_values[-1] / singular_values[0]).item()
        if relative < NEARLY_DEPENDENT:
            pairs = combinations(range(len(self.units)), 2)
            i, j = max(pairs, key=lambda pair: (self.units[pair[0]] @ self.units[pair[1]]).abs().item())
            message = f"directions {i} and {j} are all but the same (relative singular value {relative:.1e})"
            if relative < NEAR_DUPLICATE:
                raise UserError(f"{message}; leave one of them out")
            warnings.warn(message, stacklevel=2)
        return rows

    @cached_property
    def offset(self) -> Float[Tensor, " d_model"] | None:
        """What affine ablation adds to the embedding: the vector of the span with the given components."""
        if self.constants is None:
            return None
        return torch.linalg.pinv(self.units) @ torch.tensor(list(self.constants), dtype=torch.float64)

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook per write, or one at the hook point.

        Raises:
            UserError: the model has no such block or hook point, or another width.
        """
        check_raw_basis(model)
        basis = Constant(self.basis)

        def project_out(x: Tensor) -> Tensor:
            rows = basis.beside(x)
            return x - self.strength * ((x @ rows.T) @ rows)

        if self.point is not None:
            return [hook_at(model, self.point, project_out, self.basis.shape[-1], self.positions, prompt_width)]
        check_width(self.basis.shape[-1], model.cfg.d_model)
        names = write_hooks(model.cfg.n_layers, layers=self.layers, components=self.components)
        hooks = [(name, hook_of(project_out, self.positions, prompt_width)) for name in names]
        if self.offset is not None:
            offset = Constant(self.offset)
            hooks.insert(1, (names[0], hook_of(lambda x: x + offset.beside(x), self.positions, prompt_width)))
        return hooks


def _each(given: Direction | Iterable[Any]) -> Direction | tuple[Direction | Tensor, ...]:
    """One direction as it is; several, or the rows of a table of them, each checked."""
    if isinstance(given, Direction):
        return given
    if isinstance(given, DirectionGrid):
        raise UserError("a grid has a direction for every place: Ablate(grid.direction(position, layer))")
    if isinstance(given, str | Path) or _is_one(given):
        given = [given]
    rows = tuple(each if isinstance(each, Direction) else one_vector(each) for each in given)
    if not rows:
        raise UserError("Ablate needs at least one direction")
    for row in rows:
        if isinstance(row, Tensor):
            unit_of(row)
    return rows


def _is_one(given: Iterable[Any]) -> bool:
    """Whether it is one vector: a tensor or an array that is no table, or numbers."""
    if hasattr(given, "ndim"):
        return bool(given.ndim != 2)
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(each, int | float) for each in given)


@dataclass(frozen=True, eq=False, repr=False)
class AblateInTurn(Value):
    """Project directions out one after the other, as published for several: hooks alone can do it.

    x ← x − d̂ d̂ᵀ x for each direction in turn, at the input of every block, every attention output and every MLP
    output. The order matters. Of the first of two directions with cosine c, a projection of both leaves
    c·√(1 − c²) of an isotropic stream's scale and each further one c² of that: the stream is projected again at every
    block, which is why no edit of what is written does the same.

    Examples:
        >>> hooks = AblateInTurn([direction, other]).hooks(model)
        >>> logits = next_token_logits(model, chat, "Hi", interventions=AblateInTurn([direction, other]))
    """

    directions: Sequence[Direction]

    def __post_init__(self) -> None:
        if not self.directions:
            raise UserError("AblateInTurn needs at least one direction")
        for direction in self.directions:
            check_in_stream(direction)

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook per direction at every block's input and at every write."""
        n_layers = model.cfg.n_layers
        inputs = [resid_hook(layer, n_layers) for layer in range(1, n_layers)]
        hooks: list[Hook] = []
        for direction in self.directions:
            writes = Ablate(direction).hooks(model, prompt_width)
            hooks += [*writes, *((name, writes[0][1]) for name in inputs)]
        return hooks


@dataclass(frozen=True, eq=False, repr=False)
class Add(Value):
    """Add coefficient × the raw direction to the stream entering its own layer.

    x ← x + coefficient · r. Coefficient 1 is one raw difference of means, −1 subtracts it; 0 changes no bit.

    Examples:
        >>> [name for name, _ in Add(direction, 2.0).hooks(model)]
        ['blocks.2.hook_resid_pre']
    """

    direction: Direction
    coefficient: float = 1.0
    layer: int | None = None
    """Where to add it; None is the layer it was read at."""
    positions: Positions = "all"
    hook: str | None = None
    """Any hook point of a block instead, with all its heads as one vector; None is the one that the direction was read
    at, or the stream entering the layer."""

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise UserError("Add needs to know where the vector was read: Add(Direction.of(vector, layer=12))")
        if self.hook is not None and place_of_hook(self.hook) != self.target and self.layer is not None:
            raise UserError(f"layer {self.layer} is not {self.hook!r}, which is layer {place_of_hook(self.hook)}")
        if self.hook is None and self.layer not in (None, self.direction.layer):
            check_in_stream(self.direction)
        check_named("positions", self.positions, get_args(Positions))
        check_finite("coefficient", self.coefficient)
        if abs(self.coefficient) * self.direction.norm > LONGEST:
            raise UserError(
                f"{self.coefficient:g} times this direction, of norm {self.direction.norm:.3g}, is too long to add: "
                "its square overflows in the model's norms, which would make every answer empty"
            )

    @property
    def target(self) -> int:
        """The layer whose stream it is added to, or that its hook point lies in."""
        if self.layer is not None:
            return self.layer
        return self.direction.layer if self.hook is None else place_of_hook(self.hook)

    @property
    def point(self) -> str | None:
        """The hook point, where that is not the stream entering the layer."""
        place = self.hook
        if place is None and self.layer in (None, self.direction.layer):
            place = self.direction.hook_name
        return None if place is None or is_between_blocks(place) else place

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook, at the stream entering the layer or at the hook point.

        Raises:
            UserError: the model has no such layer or hook point, or another width.
        """
        check_raw_basis(model)
        vector = Constant(self.direction.vector.detach().cpu().double() * self.coefficient)

        def add(x: Tensor) -> Tensor:
            return x + vector.beside(x)

        if self.point is not None:
            return [hook_at(model, self.point, add, len(self.direction.vector), self.positions, prompt_width)]
        check_width(len(self.direction.vector), model.cfg.d_model)
        return [(resid_hook(self.target, model.cfg.n_layers), hook_of(add, self.positions, prompt_width))]


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Value):
    """Set the component of one layer's stream along a direction to a class mean's, or anywhere between and beyond.

    x ← x − r̂ r̂ᵀx + c r̂ + α r, with c = r̂ᵀ(mean of harmless) and r the raw direction: ACE (Marshall et al. 2024). At
    α = 0 every component is that of the harmless mean, at α = 1 of the harmful mean, for any estimator's direction
    whose length is the class difference along it, as `EveryPlace` gives it. `Ablate(constants=[c])` holds the component
    at c in every layer instead, and exports.

    Examples:
        >>> Affine.between(grid.direction(-1, 2), other_means).hooks(model)[0][0]
        'blocks.2.hook_resid_pre'
    """

    direction: Direction
    component: float
    """c, in units of the stream."""
    coefficient: float = 0.0
    """α."""
    layer: int | None = None
    """Whose stream; None is the layer it was read at."""
    positions: Positions = "all"

    def __post_init__(self) -> None:
        check_in_stream(self.direction)
        check_finite("component", self.component)
        check_finite("coefficient", self.coefficient)
        if abs(self.component) + abs(self.coefficient) * self.direction.norm > LONGEST:
            raise UserError(f"a component of {self.component:g} + {self.coefficient:g} directions is too long to set")

    @classmethod
    def between(cls, direction: Direction, harmless: ActivationMeans, coefficient: float = 0.0) -> "Affine":
        """With c of the harmless mean at the direction's own position and layer.

        Raises:
            UserError: the means were not read there.
        """
        if harmless.hook_name is not None:
            raise UserError(f"the means are of {harmless.hook_name}, and those of the stream are wanted")
        if direction.position not in harmless.positions or not 0 <= direction.layer < harmless.means.shape[1]:
            raise UserError(
                f"there is no mean at position {direction.position}, layer {direction.layer}: positions are "
                f"{harmless.positions}, layers 0..{harmless.means.shape[1] - 1}"
            )
        mean = harmless.means[harmless.positions.index(direction.position), direction.layer]
        return cls(direction, (direction.unit @ mean).item(), coefficient)

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook, at the stream entering the layer."""
        check_raw_basis(model)
        check_width(len(self.direction.vector), model.cfg.d_model)
        unit = Constant(self.direction.unit)
        wanted = self.component + self.coefficient * self.direction.norm

        def set_component(x: Tensor) -> Tensor:
            row = unit.beside(x)
            return x + (wanted - x @ row)[..., None] * row

        target = self.direction.layer if self.layer is None else self.layer
        hook = hook_of(set_component, self.positions, prompt_width)
        return [(resid_hook(target, model.cfg.n_layers), hook)]


@dataclass(frozen=True, eq=False, repr=False)
class Leace(Value):
    """Erase what linear probes know of the class from the stream of one layer: `Eraser` as a hook.

    For several layers take a list, one for each. Each is fitted on activations as they come: those of the plain model
    are not what a later layer sees once an earlier one is erased; read them again under the earlier ones for that
    ("concept scrubbing").

    Examples:
        >>> Leace.fit(samples, other_samples, 2, shrinkage=0.5).hooks(model)[0][0]
        'blocks.2.hook_resid_pre'
    """

    eraser: Eraser
    layer: int
    """`l` is the stream entering block `l`; `n_layers` the stream after the last block."""
    positions: Positions = "all"

    @classmethod
    def fit(
        cls,
        harmful: ActivationSamples,
        harmless: ActivationSamples,
        layer: int,
        *,
        position: int = -1,
        shrinkage: Shrinkage = None,
        positions: Positions = "all",
    ) -> "Leace":
        """Fit at one prompt position and layer.

        Args:
            position: where the activations are taken, from the end of the prompt.
            shrinkage: of `fit_eraser`.
            positions: where it acts.

        Raises:
            UserError: nothing was read there, another place than the stream entering a block was, or the class means
                do not differ.
        """
        for side in (harmful, harmless):
            if side.hook_name is not None and not is_between_blocks(side.hook_name):
                raise UserError(f"Leace acts on the stream between blocks, and these samples are of {side.hook_name}")
        rows = [side.at(position, layer) for side in (harmful, harmless)]
        return cls(fit_eraser(*rows, shrinkage=shrinkage), layer, positions)

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook, at the stream entering the layer."""
        check_raw_basis(model)
        check_width(len(self.eraser.write), model.cfg.d_model)
        write, read, mean = (Constant(each) for each in (self.eraser.write, self.eraser.read, self.eraser.mean))

        def erase(x: Tensor) -> Tensor:
            along = (x - mean.beside(x)) @ read.beside(x)
            return x - along[..., None] * write.beside(x)

        return [(resid_hook(self.layer, model.cfg.n_layers), hook_of(erase, self.positions, prompt_width))]


def all_hooks(model: HookedModel, interventions: Interventions, prompt_width: PromptWidth = None) -> list[Hook]:
    """The hooks of several interventions, in the order in which they act.

    Examples:
        >>> with model.hooks(fwd_hooks=all_hooks(model, [Ablate(direction), Add(other)])):
        ...     logits = model(chat.batch("Hi").tokens)
    """
    return [hook for each in as_interventions(interventions) for hook in each.hooks(model, prompt_width)]


def as_interventions(given: Any) -> tuple[Intervention, ...]:
    """One intervention or several as several: the one door of everything that takes interventions.

    Raises:
        UserError: something else is given, a direction or a bare tensor among it.
    """
    each = (given,) if isinstance(given, Intervention) or not isinstance(given, Iterable) else tuple(given)
    for step in each:
        if isinstance(step, type) or not isinstance(step, Intervention):
            raise UserError(
                f"expected an intervention such as Ablate(direction) or Add(direction), or a list of them, not "
                f"{step.__name__ if isinstance(step, type) else type(step).__name__}"
            )
    return each


class Constant:
    """A tensor copied once to each device and dtype that activations come in, not once a call."""

    def __init__(self, values: Float[Tensor, "..."]) -> None:
        self.values = values
        self.copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def beside(self, activation: Float[Tensor, "..."]) -> Tensor:
        key = (activation.device, activation.dtype)
        if key not in self.copies:
            self.copies[key] = self.values.to(activation.dtype).to(activation.device)
        return self.copies[key]


def hook_of(change: Change, positions: Positions, prompt_width: PromptWidth) -> HookFn:
    """A hook that applies `change` at some positions, in float32 or better, never in place.

    Half precision would lose the small component along a direction in a large stream.
    """
    return partial(_changed, change, positions, prompt_width)


def hook_at(
    model: HookedModel, name: str, change: Change, width: int, positions: Positions, prompt_width: PromptWidth
) -> Hook:
    """The same at any hook point of a block that holds a vector at every position, its heads one after the other.

    Raises:
        UserError: the model has no such hook point; where the pass comes there, what it holds has another width.
    """
    check_point(model, name)
    return name, partial(_changed_at, change, positions, prompt_width, name, width)


def _changed_at(
    change: Change,
    positions: Positions,
    prompt_width: PromptWidth,
    name: str,
    width: int,
    activation: Float[Tensor, "batch pos *inside"],
    hook: Any,
) -> Float[Tensor, "batch pos *inside"]:
    if activation.ndim < 3 or activation[0, 0].numel() != width:
        raise UserError(
            f"a direction of width {width} does not fit {name}, which holds {list(activation.shape[2:])} at a position"
        )
    changed = _changed(change, positions, prompt_width, activation.flatten(2), hook)
    return changed.reshape(activation.shape)


def _changed(
    change: Change,
    positions: Positions,
    prompt_width: PromptWidth,
    activation: Float[Tensor, "batch pos d_model"],
    hook: Any,
) -> Float[Tensor, "batch pos d_model"]:
    wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
    changed = change(wide).to(activation.dtype)
    if positions == "all":
        return changed
    return torch.where(_acts_on(activation, positions, prompt_width), changed, activation)


def _acts_on(
    activation: Float[Tensor, "batch pos d_model"], positions: Positions, prompt_width: PromptWidth
) -> Bool[Tensor, "batch_or_1 pos 1"]:
    """Which positions of this call are meant; a call narrower than the prompt is a step of cached generation."""
    n_columns = activation.shape[1]
    columns = torch.arange(n_columns, device=activation.device)[None, :, None]
    width = torch.as_tensor(n_columns if prompt_width is None else prompt_width, device=activation.device)
    is_generated = n_columns < int(width.max())
    width = width.reshape(-1, 1, 1)
    if positions == "prompt":
        return (columns < width) & (not is_generated)
    return (columns >= width - 1) | is_generated


def check_finite(name: str, value: float) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: the value is one of them.
    """
    if not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")


def check_width(width: int, d_model: int) -> None:
    """Refuse a direction of another model.

    Raises:
        UserError: the widths differ.
    """
    if width != d_model:
        raise UserError(f"a direction of width {width} does not fit a model of width {d_model}")
