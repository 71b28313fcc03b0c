"""How two classes of prompts lie at one place of the stream: means, signal, purity, silhouette, linear separability."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..directions import MIN_RELATIVE_NORM

MEASURES = (
    "norm of the harmful mean",
    "norm of the harmless mean",
    "norm of r",
    "cosine of the means",
    "cosine of r and the harmful mean",
    "cosine of r and the harmless mean",
    "signal to noise",
    "purity",
    "silhouette",
    "held-out accuracy",
)
N_FOLDS, SHRINKAGE = 5, 0.1


def class_measures(
    rows: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, "labeling prompt"], folds: Float[Tensor, " prompt"]
) -> Float[Tensor, "measure labeling"]:
    """`MEASURES` of the rows, for every labeling of them (true is harmful), in float64.

    With r = μ₊ − μ₋: signal to noise ‖r‖ / max(‖μ₊‖, ‖μ₋‖); purity ‖r − ⟨r, μ̂₋⟩ μ̂₋‖ / ‖r‖, what of r does not lie along
    the harmless mean; the mean silhouette (Rousseeuw 1987); the balanced accuracy of a linear discriminant on rows that
    it was not fitted to. The discriminant is Fisher's with a ridge, (S + λI)⁻¹ r, its threshold half-way between the
    projected means, λ a tenth of the rows' mean squared distance from their mean. NaN where r is rounding error.

    Args:
        folds: of each row, the number of the part that it is held out with; it must not depend on the labels.
    """
    x = rows.double()
    mean = x.mean(0)
    centred = x - mean
    gram, along, length = centred @ centred.T, centred @ mean, mean @ mean
    flags = labels.double()
    plus, minus = (each / each.sum(-1, keepdim=True) for each in (flags, 1 - flags))
    r = plus - minus

    def product(a: Float[Tensor, "labeling prompt"], b: Float[Tensor, "labeling prompt"]) -> Float[Tensor, " labeling"]:
        return ((a @ gram) * b).sum(-1)

    squares = [length + 2 * (each @ along) + product(each, each) for each in (plus, minus)]
    norms = [each.clamp(min=0).sqrt() for each in squares]
    norm = product(r, r).clamp(min=0).sqrt()
    norm = torch.where(norm <= MIN_RELATIVE_NORM * x.norm(dim=-1).mean(), 0.0, norm)
    there = torch.where(norm > 0, norm, torch.nan)
    between = length + (plus + minus) @ along + product(plus, minus)
    cosines = [(r @ along + product(r, each)) / (there * size) for each, size in zip((plus, minus), norms, strict=True)]
    signal = norm / torch.maximum(*norms)
    purity = (1 - cosines[1].square()).clamp(min=0).sqrt()
    found = [*norms, norm, between / (norms[0] * norms[1]), *cosines, signal, purity]
    return torch.stack([*found, _silhouettes(gram, labels), _accuracies(gram, labels, folds, _least(x))])


def random_folds(n: int, generator: torch.Generator) -> Float[Tensor, " prompt"]:
    """The fold of each of n rows, drawn without looking at their labels; all are of one size, but for the remainder."""
    order = torch.randperm(n, generator=generator)
    folds = torch.empty(n, dtype=torch.float64)
    folds[order] = (torch.arange(n) % min(N_FOLDS, n)).double()
    return folds


def _least(x: Float[Tensor, "prompt d_model"]) -> float:
    """Mean squared distances from the mean below this are rounding errors."""
    return (MIN_RELATIVE_NORM * x.norm(dim=-1).mean().item()) ** 2


def _silhouettes(
    gram: Float[Tensor, "prompt prompt"], labels: Bool[Tensor, "labeling prompt"]
) -> Float[Tensor, " labeling"]:
    """Mean of (b − a) / max(a, b): a the mean distance within a row's class, b that to the other one."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp(min=0).fill_diagonal_(0).sqrt()
    flags = labels.double()
    to_plus, total, n = flags @ distances, distances.sum(0), labels.shape[1]
    n_plus = flags.sum(-1, keepdim=True)
    own = torch.where(labels, to_plus, total - to_plus)
    n_own = torch.where(labels, n_plus, n - n_plus)
    within, nearest = own / (n_own - 1).clamp(min=1), (total - own) / (n - n_own)
    values = (nearest - within) / torch.maximum(nearest, within)
    return torch.where(n_own > 1, values, 0.0).mean(-1)


def _accuracies(
    gram: Float[Tensor, "prompt prompt"],
    labels: Bool[Tensor, "labeling prompt"],
    folds: Float[Tensor, " prompt"],
    least: float,
) -> Float[Tensor, " labeling"]:
    """Balanced accuracy on held-out rows, from inner products alone: of all labelings by one solution a fold."""
    flags = labels.double()
    right = torch.full_like(flags, 0.5)
    for fold in folds.unique():
        test, train = folds == fold, folds != fold
        inside = gram[train][:, train]
        shift = inside.mean(0)
        kernel = inside - shift - shift[:, None] + shift.mean()
        ridge = SHRINKAGE * kernel.diagonal().mean()
        if ridge <= SHRINKAGE * least:
            continue
        outside = gram[test][:, train]
        outside = outside - outside.mean(1, keepdim=True) - shift + shift.mean()
        sides = [each / each.sum(-1, keepdim=True).clamp(min=1) for each in (flags[:, train], 1 - flags[:, train])]
        solved = torch.linalg.solve(
            kernel + ridge * torch.eye(len(kernel), dtype=torch.float64), (sides[0] - sides[1]).T
        )
        fitted, scores = (kernel @ solved).T, (outside @ solved).T
        middle = sum((side * fitted).sum(-1, keepdim=True) for side in sides) / 2
        gaps = (scores - middle) * (2 * flags[:, test] - 1)
        right[:, test] = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return sum(((right * side).sum(-1) / side.sum(-1) for side in (flags, 1 - flags)), torch.zeros(len(labels))) / 2
