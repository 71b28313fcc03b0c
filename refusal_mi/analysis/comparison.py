"""Directions of different methods, models or checkpoints beside each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..figures import style as draw
from ..run.folder import RunInputs
from .result import AnalysisResult, call_with_a_run, provenance_of


@dataclass(frozen=True, eq=False, repr=False)
class ComparisonResult(AnalysisResult):
    """Cosines and lengths of named directions.

    Examples:
        >>> found.names
        ('r', 'random')
        >>> found.cosines.diagonal().round(decimals=6).tolist()
        [1.0, 1.0]
    """

    kind: ClassVar[str] = "comparison"
    units: ClassVar[Mapping[str, str]] = {"cosines": "cosine, -1 to 1", "norms": "residual stream units"}

    cosines: Float[Tensor, "direction direction"]
    norms: Float[Tensor, " direction"]
    names: tuple[str, ...]
    hook_names: tuple[str, ...]
    null_p95: float
    """95th percentile of |cosine| between two random directions of this width."""
    d_model: int

    def __post_init__(self) -> None:
        if not len(self.cosines) == len(self.norms) == len(self.names):
            raise ValueError(f"{len(self.cosines)} rows, {len(self.norms)} norms, {len(self.names)} names")


def compare_directions(
    directions: Mapping[str, Direction],
    *,
    provenance: Mapping[str, Any] | None = None,
    n_random: int = 2000,
    seed: int = 0,
) -> ComparisonResult:
    """Cosine of every pair: a base model against its chat model, one method or layer against another.

    Cosines mean something only between streams in the same basis: the same model, or checkpoints of one training.

    Examples:
        >>> compare_directions({"one": direction, "another": other}).cosines.shape
        torch.Size([2, 2])

    Args:
        directions: name -> direction.
        provenance: what they were computed from; by default their own records.
        n_random: pairs of random directions in the null.

    Raises:
        UserError: fewer than 2 directions, or of different width.
    """
    widths = {len(direction.vector) for direction in directions.values()}
    if len(directions) < 2 or len(widths) != 1:
        raise UserError(f"a comparison needs at least 2 directions of one width, not {len(directions)} of {widths}")
    (d_model,) = widths
    units = torch.stack([direction.unit for direction in directions.values()])
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n_random, d_model, generator=generator, dtype=torch.float64)
    null = torch.nn.functional.cosine_similarity(a, b, dim=-1).abs()
    own = {name: direction.describe() for name, direction in directions.items()}
    return ComparisonResult(
        units @ units.T,
        torch.tensor([direction.norm for direction in directions.values()], dtype=torch.float64),
        tuple(directions),
        tuple(direction.hook_name for direction in directions.values()),
        null.quantile(0.95).item(),
        d_model,
        provenance={**(provenance or {}), "directions": own},
    )


def from_run(run: RunInputs) -> ComparisonResult:
    """The chosen direction, those of the other positions at its layer, and a random one."""
    chosen, grid = run.direction, run.grid
    others = {
        f"position {position}": grid.direction(position, chosen.layer)
        for row, position in enumerate(grid.positions)
        if position != chosen.position and not grid.is_degenerate[row][chosen.layer]
    }
    named = {f"chosen (position {chosen.position})": chosen, **others, "random": chosen.random_like(run.seed)}
    record = provenance_of(run.model, run.chat, {}, {"seed": run.seed})
    return compare_directions(named, provenance=record, seed=run.seed)


def plot_comparison(result: ComparisonResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cosine of every pair of directions; under the title what random directions reach.

    Examples:
        >>> plot_comparison(found, title="My directions").layout.title.text
        'My directions'
    """
    names = [name.replace("position -", "position −") for name in result.names]
    labels = [draw.plain(f"{name} (‖r‖ = {norm:.3g})") for name, norm in zip(names, result.norms.tolist(), strict=True)]
    hover = "%{x}<br>%{y}<br>cosine %{z:.4f}"
    columns = [draw.plain(name) for name in names]
    figure = go.Figure(draw.heatmap(result.cosines, columns, labels, "cosine", hover=hover, limits=(-1.0, 1.0)))
    draw.categories(figure)
    figure.update_xaxes(tickangle=-30, title="direction")
    figure.update_yaxes(automargin=True, title="direction")
    null = f"95% of random pairs in {result.d_model} dimensions: |cosine| < {result.null_p95:.3f}"
    about = draw.subtitle(result.model_name, f"n = {len(labels)} directions", null)
    height = max(220, 36 * len(labels))
    return draw.finish(figure, title="Cosine between directions", about=about, height=height, width=760, look=look)


FIGURES = {"comparison": plot_comparison}

call_with_a_run(__name__)
