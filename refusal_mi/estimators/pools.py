"""Several directions for one place: peeled off one by one, or of each cluster or category of the harmful prompts."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..directions import DirectionGrid
from ..errors import UserError
from ..values import named_near
from .linear import logistic
from .samples import ActivationSamples, EveryPlace, PlaceEstimator, at_one_place


def peel(
    harmful: Float[Tensor, "a d_model"],
    harmless: Float[Tensor, "b d_model"],
    n_directions: int,
    *,
    function: PlaceEstimator = logistic,
) -> Float[Tensor, "direction d_model"]:
    """Orthogonal directions: estimate one, project it out of both classes, estimate again (Ravfogel et al. 2020).

    With the difference of means as `function` there is one only: without it the means are the same, and what would
    come next is rounding error. Rows beyond the last direction are zero.

    Examples:
        >>> first, second = peel(samples.at(-1, 2), other_samples.at(-1, 2), 2)
        >>> abs((first @ second).item()) < 1e-6
        True

    Args:
        function: rows of both classes -> a vector, of any length and sign.
    """
    left = [harmful.double(), harmless.double()]
    found = torch.zeros(n_directions, harmful.shape[1], dtype=torch.float64)
    for index in range(n_directions):
        vector = at_one_place(function, *left)
        vector = vector - _onto(vector, found[:index])
        if not bool(vector.any()):
            break
        found[index] = vector
        left = [rows - _onto(rows, vector[None]) for rows in left]
    return found


def _onto(rows: Float[Tensor, "*row d_model"], vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "*row d_model"]:
    """The part of rows in the span of orthogonal vectors."""
    units = torch.nn.functional.normalize(vectors, dim=-1)
    return rows @ units.T @ units


def peeled(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, number: int
) -> Float[Tensor, " d_model"]:
    """Direction `number`, from 1, of `peel` with logistic probes."""
    return peel(harmful, harmless, number)[number - 1]


def clusters(rows: Float[Tensor, "prompt d_model"], n_clusters: int, *, seed: int = 0) -> Int[Tensor, " prompt"]:
    """The cluster of each row by k-means (ten starts), numbered from the largest to the smallest.

    Examples:
        >>> clusters(torch.tensor([[0.0], [0.1], [9.0]]), 2)  # the largest is 0
        tensor([0, 0, 1])

    Raises:
        UserError: there are fewer rows than clusters.
    """
    from sklearn.cluster import KMeans

    if len(rows) < n_clusters:
        raise UserError(f"{n_clusters} clusters need as many prompts, not {len(rows)}")
    x = rows.double() - rows.double().mean(0)
    if len(x) < x.shape[1]:  # distances live in the span of the rows, where there are fewer coordinates
        left, singular, _ = torch.linalg.svd(x, full_matrices=False)
        x = left * singular
    fitted: Any = KMeans(n_clusters, n_init=10, random_state=seed).fit(x.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    sizes = labels.bincount(minlength=n_clusters)
    rank = torch.empty(n_clusters, dtype=torch.long)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(n_clusters)
    return rank[labels]


def cluster_differences(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], n_clusters: int, *, seed: int = 0
) -> Float[Tensor, "cluster d_model"]:
    """Mean of each cluster of the harmful prompts − mean of all harmless ones, the largest cluster first.

    Weighted by the clusters' sizes their mean is the difference of means.
    """
    labels = clusters(harmful, n_clusters, seed=seed)
    means = torch.stack([harmful.double()[labels == cluster].mean(0) for cluster in range(n_clusters)])
    return means - harmless.double().mean(0)


def cluster_difference(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, number: int, n_clusters: int
) -> Float[Tensor, " d_model"]:
    """That of cluster `number`, from 1."""
    return cluster_differences(harmful, harmless, n_clusters)[number - 1]


def by_size(categories: Sequence[str | None]) -> dict[str, list[int]]:
    """Category -> its prompts, the largest first, of equal ones the first by name; prompts without one are left out."""
    counts = Counter(each for each in categories if each is not None)
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: [index for index, each in enumerate(categories) if each == name] for name in ordered}


def category_differences(
    harmful: Float[Tensor, "a d_model"],
    harmless: Float[Tensor, "b d_model"],
    categories: Sequence[str | None],
    n_categories: int,
) -> Float[Tensor, "category d_model"]:
    """Mean of each of the largest categories of the harmful prompts − mean of all harmless ones, the largest first.

    Args:
        categories: of every harmful prompt.

    Raises:
        UserError: there are fewer categories.
    """
    found = by_size(categories)
    if len(found) < n_categories:
        raise UserError(f"{n_categories} categories were asked for, and the harmful prompts have {len(found)}")
    means = [harmful.double()[rows].mean(0) for rows in list(found.values())[:n_categories]]
    return torch.stack(means) - harmless.double().mean(0)


def of_category(harmful: ActivationSamples, harmless: ActivationSamples, *, category: str) -> DirectionGrid:
    """Mean of one category of the harmful prompts − mean of all harmless ones, at every place.

    Args:
        category: as it is written, or in small letters with - for what is no letter or digit.

    Raises:
        UserError: no harmful prompt is of it; the message says which there are.
    """
    found = by_size(harmful.categories)
    rows = [row for name, some in found.items() if category in (name, plain_name(name)) for row in some]
    if not rows:
        there = [plain_name(name) for name in found]
        about = named_near(category, there) if there else "these prompts have no categories"
        raise UserError(f"no harmful prompt is of the category {category!r}: {about}")

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return a[rows].mean(0) - b.mean(0)

    return EveryPlace(difference, f"mean of category {category}, harmful - harmless")(harmful, harmless)


def plain_name(category: str) -> str:
    """A category as options name it: "Physical harm" is physical-harm."""
    return re.sub(r"[\W_]+", "-", category.lower()).strip("-")
