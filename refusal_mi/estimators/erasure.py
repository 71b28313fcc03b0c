"""LEACE of a binary label: the smallest affine change after which no linear probe finds the class."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..values import Value
from .linear import Shrinkage, solve_covariance


@dataclass(frozen=True, eq=False, repr=False)
class Eraser(Value):
    """x ← x − write · readᵀ(x − mean), with readᵀwrite = 1."""

    write: Float[Tensor, " d_model"]
    """δ, harmful − harmless; float64."""
    read: Float[Tensor, " d_model"]
    """Σ⁺δ/(δᵀΣ⁺δ)."""
    mean: Float[Tensor, " d_model"]
    """Over the prompts of both classes; it is what the change leaves where it is."""

    def __call__(self, rows: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The rows without the class, in float64."""
        along = (rows.double() - self.mean) @ self.read
        return rows.double() - along[..., None] * self.write


def fit_eraser(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], *, shrinkage: Shrinkage = None
) -> Eraser:
    """x' = x − δ δᵀΣ⁺(x − μ)/(δᵀΣ⁺δ): LEACE in closed form for two classes (Belrose et al. 2023).

    It reads along the linear discriminant Σ⁺δ and writes along δ, an oblique projection. On these prompts the class
    means are equal afterwards, whatever the shrinkage: it changes how little else moves, not whether the class is gone.

    Examples:
        >>> fit_eraser(samples.at(-1, 2), other_samples.at(-1, 2), shrinkage=0.5).write.shape == (model.cfg.d_model,)
        True

    Args:
        shrinkage: of Σ, the covariance of both classes together; None is Ledoit and Wolf's, which fewer prompts than
            coordinates need; 0.0 is the plain pseudo-inverse.

    Raises:
        UserError: the class means do not differ, or the shrinkage is no fraction.
    """
    rows = torch.cat([harmful, harmless]).double()
    mean = rows.mean(0)
    difference = harmful.double().mean(0) - harmless.double().mean(0)
    solved = solve_covariance(rows - mean, difference, shrinkage)
    overlap = solved @ difference
    if overlap <= 0:
        raise UserError("the means of the two classes do not differ here: there is nothing to erase")
    return Eraser(difference, solved / overlap, mean)
