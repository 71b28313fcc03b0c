"""Gradient descent over orthonormal rows: tangent gradients, AdamW, early stopping, checkpoints."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors, write_tensors
from ..precision import finite
from ..progress import track
from ..values import Value

BETAS, LARGEST_GRADIENT, REDUCTION = (0.9, 0.98), 10.0, 10.0
"""Of AdamW (amsgrad, no weight decay); the norm at which gradients are cut; what the learning rate is divided by."""
DEPENDENT = 1e-6
"""Length of a row, of unit ones, outside of the span of the others, below which there is no direction left of it."""
Evaluate = Callable[[Tensor, int], tuple[Sequence[float], Tensor]]
"""Orthonormal rows and the step's number -> the loss and its terms, and the gradient of the loss."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_COUNTERS = ("step", "waited", "reductions", "is_over", "best_step")


@dataclass(frozen=True)
class DescentOptions:
    """How far a descent goes, and when it stops.

    Examples:
        >>> DescentOptions(n_steps=5).patience
        5
    """

    n_steps: int = 100
    """At most."""
    learning_rate: float = 1e-2
    patience: int = 5
    """Steps without a new lowest loss after which the learning rate is divided by 10."""
    n_reductions: int = 2
    """How often that is done; the next time, the descent ends."""

    def __post_init__(self) -> None:
        if min(self.n_steps, self.patience) < 1 or self.n_reductions < 0:
            raise UserError("a descent needs n_steps and patience of at least 1, and no negative n_reductions")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"the learning rate must be a positive number, not {self.learning_rate}")


@dataclass(frozen=True, eq=False, repr=False)
class Descent(Value):
    """Where a descent came."""

    rows: Float[Tensor, "n d_model"]
    """Those of the lowest loss; orthonormal, float64."""
    losses: Float[Tensor, "step term"]
    """Before each step: the loss, and its terms."""
    best_step: int
    stopped_early: bool


def orthonormal(
    rows: Float[Tensor, "n d_model"], orthogonal_to: Float[Tensor, "m d_model"] | None = None
) -> Float[Tensor, "n d_model"]:
    """Gram-Schmidt in float64, the first row first: each keeps its side, and what it has beyond those before it.

    Examples:
        >>> orthonormal(torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Args:
        orthogonal_to: vectors in whose span no row may have a part.

    Raises:
        UserError: nothing is left of a row.
    """
    found: list[Tensor] = []
    if orthogonal_to is not None and len(orthogonal_to):
        _, singular, span = torch.linalg.svd(orthogonal_to.double(), full_matrices=False)
        found += list(span[singular > DEPENDENT * singular[0]])
    n_given = len(found)
    for row in rows.double():
        left = row / row.norm()
        for _ in range(2):  # once leaves rounding errors of a row that is nearly in the span
            for other in found:
                left = left - (left @ other) * other
        if not left.norm() > DEPENDENT:
            raise UserError("a row is zero, or in the span of the rows before it and of what it must be orthogonal to")
        found.append(left / left.norm())
    return torch.stack(found[n_given:])


def tangent(gradient: Float[Tensor, "n d_model"], rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The part of a gradient along which orthonormal rows stay so: G − ½(GBᵀ + BGᵀ)B; for one row g − (g·v)v.

    Examples:
        >>> tangent(torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.0, 5.0]]
    """
    overlap = gradient @ rows.T
    return gradient - (overlap + overlap.T) / 2 @ rows


def descend(
    evaluate: Evaluate,
    start: Float[Tensor, "n d_model"],
    options: DescentOptions | None = None,
    *,
    orthogonal_to: Float[Tensor, "m d_model"] | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    description: str = "descending",
) -> Descent:
    """Orthonormal rows of lowest loss: AdamW on tangent gradients, Gram-Schmidt after every step.

    Stops after `options.n_steps`, or once `patience` steps without a new lowest loss have followed the last reduction
    of the learning rate. The loss is that of whatever `evaluate` reads at a step, so that with batches of texts the
    lowest may be of an easy one (as in the code of Wollschläger et al. 2025).

    Args:
        evaluate: of the same rows and step always the same.
        orthogonal_to: vectors in whose span the rows have no part, at any step.
        checkpoint: a `.pt` file, written after every step; where it is there, the descent goes on from it, bit for bit
            as if it had never stopped.
        key: what is descended on; a checkpoint of another key is refused.

    Raises:
        UserError: a loss or gradient is not finite, or the checkpoint is of something else.
    """
    options = DescentOptions() if options is None else options
    state = _State.start(orthonormal(start, orthogonal_to), key)
    if checkpoint is not None and checkpoint.exists():
        state.read_(checkpoint, options)
    for _ in track(range(state.counters["step"], options.n_steps), description):
        if state.counters["is_over"]:
            break
        values, gradient = evaluate(state.rows, state.counters["step"])
        state.note_(finite(torch.tensor(list(values), dtype=torch.float64), "the losses"), options)
        state.move_(finite(gradient.detach().double(), "the gradient"), options, orthogonal_to)
        if checkpoint is not None:
            write_tensors(checkpoint, state.tensors())
    counters = state.counters
    return Descent(state.best, torch.stack(state.losses), counters["best_step"], bool(counters["is_over"]))


@dataclass
class _State:
    """All that the next step depends on."""

    rows: Tensor
    best: Tensor
    losses: list[Tensor]
    counters: dict[str, int]
    moments: dict[str, Tensor]
    key: str

    @classmethod
    def start(cls, rows: Tensor, key: str) -> "_State":
        moments = {name: torch.zeros_like(rows) for name in _MOMENTS}
        return cls(rows, rows, [], dict.fromkeys(_COUNTERS, 0), moments, key)

    def note_(self, losses: Tensor, options: DescentOptions) -> None:
        """Keep the rows if their loss is the lowest; else wait, reduce the learning rate, end."""
        counters, step = self.counters, self.counters["step"]
        self.losses.append(losses)
        if step == 0 or losses[0] < self.losses[counters["best_step"]][0]:
            self.best = self.rows
            counters |= {"best_step": step, "waited": 0}
            return
        counters["waited"] += 1
        if counters["waited"] == options.patience:
            counters["is_over"] = int(counters["reductions"] == options.n_reductions)
            counters |= {"waited": 0, "reductions": counters["reductions"] + 1}

    def move_(self, gradient: Tensor, options: DescentOptions, orthogonal_to: Tensor | None) -> None:
        """A step of AdamW from the rows, and back to orthonormal ones."""
        gradient = tangent(gradient, self.rows)
        gradient = gradient * min(1.0, LARGEST_GRADIENT / max(gradient.norm().item(), 1e-300))
        rate = options.learning_rate / REDUCTION ** self.counters["reductions"]
        moved = self.rows.clone().requires_grad_()
        moved.grad = gradient
        adam = torch.optim.AdamW([moved], lr=rate, betas=BETAS, weight_decay=0.0, amsgrad=True, foreach=False)
        adam.state[moved] = {"step": torch.tensor(float(self.counters["step"])), **self.moments}
        adam.step()
        self.rows = orthonormal(moved.detach(), orthogonal_to)
        self.counters["step"] += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {
            "rows": self.rows,
            "best": self.best,
            "losses": torch.stack(self.losses),
            "counters": torch.tensor([self.counters[name] for name in _COUNTERS]),
            "key": torch.tensor(list(self.key.encode()), dtype=torch.uint8),
            **self.moments,
        }

    def read_(self, path: Path, options: DescentOptions) -> None:
        """Go on from a checkpoint."""
        held = read_tensors(path)
        if not isinstance(held, dict) or not all(isinstance(held.get(name), Tensor) for name in (*_MOMENTS, *_FIELDS)):
            raise UserError(f"{path} is no checkpoint of a descent: name another file, or remove it")
        if bytes(held["key"].flatten().to(torch.uint8).tolist()) != self.key.encode():
            raise UserError(
                f"{path} is a checkpoint of another model, other texts, options or another start: name another file, "
                "or remove it"
            )
        counters, losses = held["counters"].flatten().tolist(), held["losses"]
        like = [held[name] for name in ("rows", "best", *_MOMENTS)]
        fits = all(each.shape == self.rows.shape and each.dtype == self.rows.dtype for each in like)
        fits = fits and all(bool(torch.isfinite(each).all()) for each in (*like, losses))
        self.counters = dict(zip(_COUNTERS, map(int, counters), strict=False))
        fits = fits and len(counters) == len(_COUNTERS) and losses.ndim == 2 and min(counters) >= 0
        if not fits or not self.counters["best_step"] < len(losses) == self.counters["step"]:
            raise UserError(f"{path} is a damaged checkpoint: remove it")
        if len(losses) > options.n_steps:
            raise UserError(f"{path} is {len(losses)} steps far, and n_steps is {options.n_steps}")
        self.rows, self.best, self.losses = held["rows"], held["best"], list(losses)
        self.moments = {name: held[name] for name in _MOMENTS}


_FIELDS = ("rows", "best", "losses", "counters", "key")
