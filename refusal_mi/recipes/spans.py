"""Where the directions come from that methods are compared by: places, estimators, pools, fits; and their controls."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import DirectionGrid, difference_in_means
from ..errors import UserError
from ..estimators.cones import fit_cone
from ..estimators.named import Named
from ..estimators.names import CATEGORY, FITTED, N_CLUSTERS
from ..estimators.pools import category_differences, cluster_differences, peel
from ..estimators.rdo import RDOOptions, RDOTexts, fit_rdo
from ..estimators.samples import ActivationSamples, needs_prompts
from ..interventions import NEAR_DUPLICATE
from ..reading import mean_activations, sample_activations, template_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs, load_ranked
from ..search.grid import select
from ..search.passes import Basis
from ..text.prompts import PromptSet
from .pieces import NothingToDo
from .rdo import own_texts
from .search import estimated, named_estimator

N_FITTED = 64
"""Training prompts a side that RDO and cones are fitted to."""


class NoDirections(NothingToDo):
    """A method gives none here."""


@dataclass
class Spans:
    """Orthonormal bases of what methods remove, from the training prompts of a run."""

    given: RunInputs
    n_places: int
    """Layers that are tried, at most."""
    checkpoints: Callable[[str], Path]
    """Label -> the file that a fit goes on from."""
    draw: int = 0
    """0: all training prompts; else as many of each side, drawn from them with repetition by this seed."""
    _streams: dict[str, Tensor] = field(default_factory=dict)
    """Of all training prompts, whatever is drawn."""
    _grids: dict[int, DirectionGrid] = field(default_factory=dict)

    def of_draw(self, draw: int) -> "Spans":
        """The same from one draw of the training prompts."""
        return self if draw == self.draw else replace(self, draw=draw, _grids={})

    @cached_property
    def run(self) -> RunInputs:
        """The run with all of its prompts."""
        return replace(self.given, max_prompts=sys.maxsize)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Position and layer of the best survivors, one for each layer, the run's own first; then its neighbours."""
        run, layer, position = self.run, self.run.direction.layer, self.run.direction.position
        if position is None:
            raise UserError(f"{run.path}: its direction does not say at which position it was read")
        best = {layer: position}
        for row in select(run.scores, run.options.thresholds).survivors:
            best.setdefault(row.layer, row.position)
        for near in sorted(range(run.grid.n_layers), key=lambda each: abs(each - layer)):
            best.setdefault(near, position)
        return [(position, layer) for layer, position in best.items()][: self.n_places]

    @cached_property
    def _training(self) -> dict[str, PromptSet]:
        return {side: self.run.record.side(side).kept_set("train") for side in SIDES}

    @cached_property
    def _drawn(self) -> dict[str, list[int]]:
        """Indices of the training prompts that directions are made of."""
        drawn = torch.Generator().manual_seed(self.draw)
        sizes = {side: len(prompts) for side, prompts in self._training.items()}
        if not self.draw:
            return {side: list(range(n)) for side, n in sizes.items()}
        return {side: torch.randint(n, (n,), generator=drawn).tolist() for side, n in sizes.items()}

    @cached_property
    def prompts(self) -> dict[str, PromptSet]:
        """Those that directions are made of; drawn ones may be there several times."""
        return {
            side: replace(prompts, prompts=tuple(prompts.prompts[row] for row in self._drawn[side]))
            for side, prompts in self._training.items()
        }

    @cached_property
    def streams(self) -> dict[str, Float[Tensor, "prompt pos layer d_model"]]:
        """Of these prompts, at the layers of `places`."""
        run, layers = self.run, [layer for _, layer in self.places]
        for side, prompts in self._training.items():
            if side not in self._streams:
                read = template_residuals(run.model, run.chat, prompts, layers=layers, batch_size=8)
                self._streams[side] = read
        return {side: self._streams[side][self._drawn[side]] for side in SIDES}

    @cached_property
    def own_texts(self) -> RDOTexts:
        """What directions are fitted to by gradients."""
        run = self.run
        return own_texts(run.model, run.chat, run.direction, *(each[:N_FITTED] for each in self.prompts.values()))

    def trials(self, name: str, k: int) -> list[tuple[tuple[int | None, int], Basis]]:
        """Place and basis of every place where a method gives all of its directions.

        Raises:
            NoDirections: there is no such place.
        """
        if name == "ranks" and self.draw:
            raise NoDirections("the search is not repeated on drawn prompts")
        if name == "ranks":
            n_there = len(select(self.run.scores, self.run.options.thresholds).survivors)
            if k > n_there:
                raise NoDirections(f"the search has {n_there} survivor(s)")
            directions = load_ranked(self.run.path, range(k))
            first = directions[0]
            return [((first.position, first.layer), orthonormal(torch.stack([each.unit for each in directions])))]
        if name in FITTED:
            direction = self.run.direction
            return [((direction.position, direction.layer), orthonormal(self._fitted(name, k)))]
        pool = self._pools.get(name)
        estimator = None if pool else named_estimator(name)
        found: list[tuple[tuple[int | None, int], Basis]] = []
        for place in self.places:
            vectors = self._vector(estimator, *place)[None] if pool is None else pool(*self._column(*place).values(), k)
            if bool(vectors.any(-1).all()):
                found.append((place, orthonormal(vectors)))
        if not found:
            raise NoDirections("it gives fewer directions at every place")
        return found

    def controls(self, ranks: Sequence[int], n_random: int) -> list[tuple[str, int, Basis]]:
        """Isotropic spans, and those of differences within one class at the first place: name, seed, basis."""
        width, found = self.run.model.cfg.d_model, []
        column = self._column(*self.places[0])
        for k in ranks:
            for seed in range(n_random):
                found.append(("random", seed, random_span(k, width, seed)))
            for seed, side in enumerate(SIDES):
                rows, drawn = column[side], torch.Generator().manual_seed(1000 * k + seed)
                if k < len(rows):
                    halves = [torch.randperm(len(rows), generator=drawn).chunk(2) for _ in range(k)]
                    spans = torch.stack([rows[one].mean(0) - rows[other].mean(0) for one, other in halves])
                    with suppress(NoDirections):  # of few prompts two halves can be the same
                        found.append((f"within {side}", seed, orthonormal(spans)))
        return found

    @property
    def _pools(self) -> Mapping[str, Callable[..., Tensor]]:
        """Rows of both classes at one place, and how many -> `[k d_model]`."""
        return {
            "peel": peel,
            "kmeans": lambda harmful, harmless, k: cluster_differences(harmful, harmless, N_CLUSTERS)[:k],
            CATEGORY: lambda harmful, harmless, k: category_differences(
                harmful, harmless, self.prompts["harmful"].categories, k
            ),
        }

    def _column(self, position: int, layer: int) -> dict[str, Float[Tensor, "prompt d_model"]]:
        index = [each for _, each in self.places].index(layer)
        return {side: self.streams[side][:, position, index].double() for side in SIDES}

    def _fitted(self, name: str, k: int) -> Float[Tensor, "k d_model"]:
        """Directions found by gradients from the run's own; what was killed goes on from its last step."""
        run, checkpoint = self.run, self.checkpoints(f"{name}:{k}" if not self.draw else f"draw {self.draw}/{name}:{k}")
        options = RDOOptions(retention_form="code", seed=self.draw)
        held = (run.model, run.chat, run.direction, self.own_texts, options)
        fit = (
            fit_rdo(*held, checkpoint=checkpoint)
            if name == "rdo"
            else fit_cone(*held, n_directions=k, checkpoint=checkpoint)
        )
        for each in checkpoint.parent.glob("checkpoint-*.pt"):
            each.unlink()
        return torch.stack([each.unit for each in fit.directions])

    def _vector(self, estimator: Any, position: int, layer: int) -> Float[Tensor, " d_model"]:
        """An estimator's direction at a place: of the package from that place alone, of a user from all."""
        if isinstance(estimator, Named) or estimator is difference_in_means:
            sides = [
                ActivationSamples(rows[:, None, None], (-1,), self.prompts[side].categories)
                for side, rows in self._column(position, layer).items()
            ]
            given = sides if needs_prompts(estimator) else [each.means for each in sides]
            vector: Tensor = estimator(*given).vectors[0, 0]
            return vector.double()
        grid = self._grids.get(id(estimator))
        if grid is None:
            reader = sample_activations if needs_prompts(estimator) else mean_activations
            read = [reader(self.run.model, self.run.chat, each) for each in self.prompts.values()]
            grid = self._grids[id(estimator)] = estimated(estimator, read)
        if grid.is_degenerate[grid.positions.index(position)][layer]:
            return torch.zeros(grid.vectors.shape[-1], dtype=torch.float64)
        return grid.vectors[grid.positions.index(position), layer].double()


def random_span(k: int, width: int, seed: int) -> Basis:
    """An isotropic subspace of k dimensions."""
    drawn = torch.Generator().manual_seed(1000 * k + seed)
    return orthonormal(torch.randn(k, width, generator=drawn, dtype=torch.float64))


def orthonormal(vectors: Float[Tensor, "k d_model"]) -> Basis:
    """Orthonormal rows that span the vectors.

    Raises:
        NoDirections: they are all but dependent.
    """
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    found = torch.linalg.qr(units.T)
    if found.R.diagonal().abs().min() < NEAR_DUPLICATE:
        raise NoDirections("its directions are all but dependent")
    return found.Q.T.contiguous()
