"""`refusal-mi select`: choose again from saved scores, without a model."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .arguments import AsJson
from .bundles import ThresholdOptions, flat


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("select")(command)


@flat
def command(
    *,
    grid: Annotated[Path, typer.Argument(metavar="GRID.json", help="A direction_evaluations.json.")],
    n_layers: Annotated[int, typer.Option(help="Number of blocks of the model that was scored.")],
    thresholds: ThresholdOptions,
    top: Annotated[int, typer.Option(help="Survivors to show.")] = 10,
    as_json: AsJson = False,
) -> int:
    """Select a direction from saved scores, ours or published."""
    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}")
    from ..candidates import ScoreGrid
    from ..selection import select
    from .tables import print_json, print_survivors

    chosen = select(ScoreGrid.load(grid, n_layers), thresholds.rule)
    if as_json:
        survivors = [row.describe() for row in chosen.survivors]
        print_json({"explanation": chosen.explain(), "survivors": survivors})
    else:
        print_survivors(chosen, top)
    return 0 if chosen.survivors else 1
