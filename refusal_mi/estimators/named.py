"""The estimators that a command line can name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..directions import ActivationMeans, DirectionGrid, Estimator, difference_in_means
from .linear import lda, logistic, pca_of_differences
from .location import clipped_difference, median_difference, projected_difference, winsorised_difference
from .names import CATEGORY, N_CLUSTERS, parse_name
from .pools import cluster_difference, of_category, peeled
from .samples import EveryPlace, PlaceEstimator, SampleEstimator, along


def projected(harmful: ActivationMeans, harmless: ActivationMeans) -> DirectionGrid:
    """r − (r·m̂)m̂ at every place, m the harmless mean there: of means alone."""
    grid = difference_in_means(harmful, harmless)
    vectors, is_degenerate = torch.zeros_like(grid.vectors), [list(row) for row in grid.is_degenerate]
    for row, layers in enumerate(is_degenerate):
        for layer, is_none in enumerate(layers):
            places = harmful.means[row, layer], harmless.means[row, layer]
            if not is_none:
                vectors[row, layer] = along(projected_difference(*places), grid.vectors[row, layer])
            layers[layer] = not bool(vectors[row, layer].any())
    provenance = {**grid.provenance, "method": "projected difference in means"}
    return replace(grid, vectors=vectors, is_degenerate=tuple(map(tuple, is_degenerate)), provenance=provenance)


@dataclass(frozen=True)
class Named:
    """An estimator of this package under the name that options and records say."""

    name: str
    function: Callable[[Any, Any], DirectionGrid]
    sees_prompts: bool

    def __call__(self, harmful: Any, harmless: Any) -> DirectionGrid:
        return self.function(harmful, harmless)


_PLACES: dict[str, tuple[str, PlaceEstimator]] = {
    "median": ("geometric median, harmful - harmless", median_difference),
    "winsorised": ("winsorised mean, harmful - harmless", winsorised_difference),
    "clipped": ("mean of clipped activations, harmful - harmless", clipped_difference),
    "pca": ("first component of all differences", pca_of_differences),
    "logistic": ("logistic probe", logistic),
    "lda": ("linear discriminant, Ledoit-Wolf", lda),
}


def estimator_named(name: str) -> Estimator | SampleEstimator:
    """The estimator of this name: "median", "kmeans-2", "category-drugs", …; "mean" is `difference_in_means` itself.

    Examples:
        >>> estimator_named("median")(samples, other_samples).direction(-1, 2).layer
        2

    Raises:
        UserError: there is none; the message names a near one.
    """
    stem, number = parse_name(name)
    if stem == "mean":
        return difference_in_means
    if stem == "projected":
        return Named(name, projected, sees_prompts=False)
    if stem == CATEGORY:
        return Named(name, partial(of_category, category=name.partition("-")[2]), sees_prompts=True)
    if stem == "peel":
        function: PlaceEstimator = partial(peeled, number=number)
        return Named(name, EveryPlace(function, f"peeled logistic probe {number}"), sees_prompts=True)
    if stem == "kmeans":
        function = partial(cluster_difference, number=number, n_clusters=N_CLUSTERS)
        method = f"mean of cluster {number} of {N_CLUSTERS}, harmful - harmless"
        return Named(name, EveryPlace(function, method), sees_prompts=True)
    method, function = _PLACES[stem]
    return Named(name, EveryPlace(function, method), sees_prompts=True)
