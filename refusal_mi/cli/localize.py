"""`refusal-mi localize`: where, and how little, a run's direction has to be removed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import number_or_auto
from .options import AsJson, BatchSize, ModelOptions, flat

if TYPE_CHECKING:
    from ..recipes.localize import LeastIntervention

FOLDER = "localize"


@flat
def localize(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    kl_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the plain answers that the KL goes over.")] = 1,
    n_directions: Annotated[int, typer.Option(min=1, help="Source directions that are tried.")] = 4,
    n_random: Annotated[int, typer.Option(min=1, help="Random directions removed from the same writes.")] = 5,
    n_prompts: Annotated[int, typer.Option(help="Prompts a side, at most.")] = 100,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of every judged answer.")] = 64,
    batch_size: BatchSize = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default RUN/localize.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find where, and how little, a direction must be removed.

    Bands of blocks, components, strengths and source directions are searched by refusal score and KL, without
    generating; the best are judged by their answers, and the one that is taken is measured on held-out prompts.
    """
    from ..model.provenance import display_name
    from ..recipes.localize import localize as compute
    from ..recipes.options import default_folder
    from ..run.folder import RunInputs, check_model_of_run
    from .tables import print_json, print_least

    source = model.source
    path = run or default_folder(source)
    check_model_of_run(path, source)
    if n_prompts < 2:
        raise UserError(f"--n-prompts must be at least 2, not {n_prompts}")
    folder = output_dir or path / FOLDER
    found, _ = compute(
        RunInputs(model.load(), path, n_prompts),
        kl_tokens=kl_tokens,
        n_directions=n_directions,
        n_random=n_random,
        max_new_tokens=max_new_tokens,
        batch_size=number_or_auto(batch_size),
        output_dir=folder,
    )
    _draw(found, display_name(source), folder)
    print_json(found) if as_json else print_least(found, source, folder)
    return 0


def _draw(found: "LeastIntervention", name: str, folder: Path) -> None:
    from ..figures.localize import plot_front, plot_writes
    from ..figures.save import save_figures

    writes = {each.hook: (each.score_nats, each.kl_nats) for each in found.writes}
    front = plot_front(found.measured, found.front, found.whole, found.least, model=name, n=found.n_validation)
    save_figures({"writes": plot_writes(writes, found.plain_score_nats, model=name), "front": front}, folder)
