"""Directions from second moments and from classifiers: principal components, LDA, logistic probe."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError

CONSTANT = 1e-12
"""A spread, or a singular value, below this fraction of the largest is rounding error."""
Shrinkage = float | None
"""A fraction from 0 to 1; None is Ledoit and Wolf's."""


def pca_of_differences(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"]
) -> Float[Tensor, " d_model"]:
    """First eigenvector of the mean of (a − b)(a − b)ᵀ over all pairs of a harmful and a harmless prompt.

    That is Σ_a + Σ_b + δδᵀ, δ the difference of means and Σ the covariances (1/n): what random pairs give on average,
    without depending on how unpaired prompts happen to lie beside each other. Not centred, so δ takes part.

    Examples:
        >>> pca_of_differences(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        tensor([1., 0.], dtype=torch.float64)
    """
    centred = [rows - rows.mean(0) for rows in (harmful, harmless)]
    difference = harmful.mean(0) - harmless.mean(0)
    return first_component(torch.cat([*(rows / len(rows) ** 0.5 for rows in centred), difference[None]]))


def pca_of_pairs(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, centred: bool = False
) -> Float[Tensor, " d_model"]:
    """First right singular vector of the differences of prompts that belong together, row by row.

    Args:
        centred: subtract the mean difference first. What remains has no part of the difference of means left but by
            chance: for comparison with tools that do it.

    Raises:
        UserError: the sides have different numbers of prompts.
    """
    if harmful.shape != harmless.shape:
        raise UserError(
            f"pairs need as many prompts on each side, not {len(harmful)} and {len(harmless)}; pca_of_differences "
            "needs no pairs"
        )
    differences = harmful.double() - harmless.double()
    return first_component(differences - differences.mean(0) if centred else differences)


def first_component(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " d_model"]:
    """The unit vector u of largest Σ (x·u)²; its sign is arbitrary."""
    return torch.linalg.svd(rows.double(), full_matrices=False)[2][0]


def lda(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, shrinkage: Shrinkage = None
) -> Float[Tensor, " d_model"]:
    """Σ⁺δ with Σ = (1 − γ) S + γ (tr S/d) I, S the covariance within the classes (Fisher 1936; Ledoit and Wolf 2004).

    Examples:
        >>> lda(samples.at(-1, 2), other_samples.at(-1, 2)).shape == (model.cfg.d_model,)
        True

    Args:
        shrinkage: γ; 0 takes S⁺, the pseudo-inverse, and ignores what of δ lies outside of the spread within classes.

    Raises:
        UserError: γ is no fraction.
    """
    within = torch.cat([rows.double() - rows.double().mean(0) for rows in (harmful, harmless)])
    difference = harmful.double().mean(0) - harmless.double().mean(0)
    return solve_covariance(within, difference, shrinkage)


def solve_covariance(
    centred: Float[Tensor, "row d_model"], vector: Float[Tensor, " d_model"], shrinkage: Shrinkage = None
) -> Float[Tensor, " d_model"]:
    """Σ⁺v with Σ = (1 − γ) XᵀX/n + γ (tr XᵀX/(n d)) I, without a d × d matrix.

    Args:
        centred: X, whose mean was subtracted.
        shrinkage: γ; None is `ledoit_wolf(centred)`.

    Raises:
        UserError: γ is no fraction.
    """
    gamma = ledoit_wolf(centred) if shrinkage is None else shrinkage
    if not 0 <= gamma <= 1:
        raise UserError(f"shrinkage is a fraction, 0 to 1, not {shrinkage}")
    _, singular, basis = torch.linalg.svd(centred, full_matrices=False)
    is_kept = singular > CONSTANT * singular[0] * max(centred.shape)
    if not bool(is_kept.any()):
        return vector.clone()
    variances, basis = singular[is_kept].square() / len(centred), basis[is_kept]
    ridge = gamma * variances.sum() / centred.shape[1]
    inside = basis @ vector
    solved = (inside / ((1 - gamma) * variances + ridge)) @ basis
    return solved if gamma == 0 else solved + (vector - inside @ basis) / ridge


def ledoit_wolf(centred: Float[Tensor, "row d_model"]) -> float:
    """The shrinkage γ towards (tr S/d) I of least expected squared error (Ledoit and Wolf 2004, lemma 3.2 and on)."""
    n, d = centred.shape
    gram = centred @ centred.T if n <= d else centred.T @ centred
    trace = centred.square().sum() / n
    square = gram.square().sum() / n**2
    spread = square - trace.square() / d
    noise = centred.square().sum(-1).square().sum() / n**2 - square / n
    if spread <= CONSTANT * square:
        return 1.0 if square > 0 else 0.0
    return (noise / spread).clamp(0, 1).item()


def logistic(harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"]) -> Float[Tensor, " d_model"]:
    """Weights of an L2 logistic regression (C = 1, LBFGS) on standardised features, in the stream's coordinates.

    Examples:
        >>> logistic(samples.at(-1, 2), other_samples.at(-1, 2)).shape == (model.cfg.d_model,)
        True
    """
    labels = torch.arange(len(harmful) + len(harmless)) < len(harmful)
    return logistic_weights(torch.cat([harmful, harmless]).double(), labels)


def logistic_weights(
    features: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"]
) -> Float[Tensor, " d_model"]:
    """The same from one table; zero where the features are the same for every prompt."""
    center, spread = features.mean(0), features.std(0, correction=0)
    is_alive = is_varied(features)
    if not bool(is_alive.any()):
        return torch.zeros_like(center)
    scale = torch.where(is_alive, spread, torch.ones_like(spread))
    return _logistic((features - center) / scale * is_alive, labels) / scale * is_alive


def is_varied(features: Float[Tensor, "prompt d_model"]) -> Bool[Tensor, " d_model"]:
    """Which features are not the same for every prompt."""
    return features.std(0, correction=0) > CONSTANT * features.abs().amax(0)


def _logistic(features: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"]) -> Float[Tensor, " d_model"]:
    """The solution lies in the span of the rows, where there are few coordinates to fit."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    _, singular, rows = torch.linalg.svd(features, full_matrices=False)
    basis = rows[singular > CONSTANT * singular[0]]
    with config_context(skip_parameter_validation=True, assume_finite=True):
        probe: Any = LogisticRegression(max_iter=1000).fit((features @ basis.T).numpy(), labels.numpy())
    return torch.from_numpy(probe.coef_[0]).double() @ basis
