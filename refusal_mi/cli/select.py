"""`refusal-mi select`: which candidate of a run other thresholds, or another rule, would choose."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import check_choice
from ..terminal import say
from .options import SCIENCE_FAILED, AsJson, Device, ModelOptions, ThresholdOptions, flat

if TYPE_CHECKING:
    from ..search.thresholds import Thresholds

RULES = ("published", "cosmic")


@flat
def select_saved(
    *,
    grid: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|GRID.json", help="A run folder, or a direction_evaluations.json.")
    ],
    n_layers: Annotated[
        int | None, typer.Option(help="Blocks of the model that was scored; default: as the run folder says.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option(help="published, by saved scores; cosmic: by cosines, measured with the run's model, beside it."),
    ] = "published",
    asked: ThresholdOptions,
    top: Annotated[int, typer.Option(help="Survivors to show.")] = 10,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Select a direction from saved scores.

    The choice of the run stays what it is.
    """
    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}")
    check_choice("--rule", rule, RULES)
    if rule == "cosmic":
        return _by_cosines(grid, asked.thresholds, n_layers, top, device, as_json)
    from ..run.folder import load_evaluations, scored_layers
    from ..run.record import EVALUATIONS
    from ..search.grid import select
    from .tables import print_json, print_survivors

    file = grid / EVALUATIONS if grid.is_dir() else grid
    blocks = n_layers if n_layers is not None else scored_layers(file)
    if blocks is None:
        raise UserError(f"{grid} does not say how many blocks the model has: give --n-layers")
    chosen = select(load_evaluations(file, blocks), asked.thresholds)
    if as_json:
        survivors = [row.describe() for row in chosen.survivors]
        print_json({"explanation": chosen.explain(), "survivors": survivors})
    else:
        print_survivors(chosen, top)
    return 0 if chosen.survivors else SCIENCE_FAILED


def _by_cosines(
    path: Path, thresholds: "Thresholds", n_layers: int | None, top: int, device: str, as_json: bool
) -> int:
    from ..directions import cosine
    from ..files import read_record
    from ..recipes.cosmic import cosmic_of_run
    from ..run.folder import RunInputs
    from ..run.record import EVALUATIONS, RUN, RunInfo
    from ..run.stages import RunFolder
    from ..search.grid import select
    from .tables import print_cosmic, print_json

    if n_layers is not None or not all((path / file).is_file() for file in (RUN, EVALUATIONS)):
        raise UserError(
            f"--rule cosmic measures activations: name a run folder with scores, without --n-layers, not {path}"
        )
    made = read_record(path / RUN, RunInfo).model
    if made.is_held:
        raise UserError(
            f"{path} is a run of a model in memory: --rule cosmic needs one by name; "
            "in Python recipes.cosmic.cosmic_of_run(RunInputs(model, path))"
        )
    run = RunInputs(ModelOptions.of_run(made, device).load(), path)
    measured = cosmic_of_run(run, RunFolder(path, False, say))
    chosen, published = measured.choose(thresholds), select(run.scores, thresholds)
    best = [each.survivors[0] for each in (chosen, published) if each.survivors]
    both = [run.grid.direction(row.position, row.layer) for row in best]
    between = cosine(*both) if len(both) == 2 else None
    if as_json:
        survivors = {
            "survivors": [row.describe() for row in chosen.survivors],
            "published": [row.describe() for row in published.survivors],
        }
        print_json({"explanation": chosen.explain(), "layers": measured.layers, "cosine": between, **survivors})
    else:
        print_cosmic(chosen, published, measured.layers, between, top)
    return 0 if chosen.survivors else SCIENCE_FAILED
