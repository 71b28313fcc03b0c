"""`refusal-mi localize`: where, and how little, a run's direction has to be removed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import number_or_auto
from .options import (
    AsJson,
    BatchSize,
    Engine,
    ModelOptions,
    NewTokens,
    NPrompts,
    NRandom,
    OutputDir,
    Workers,
    at_least,
    flat,
)

if TYPE_CHECKING:
    from ..recipes.localize import LeastIntervention

FOLDER = "localize"


@flat
def localize(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    kl_tokens: Annotated[int, typer.Option(help="Tokens of the plain answers that the KL goes over.")] = 1,
    n_directions: Annotated[int, typer.Option(help="Source directions that are tried.")] = 4,
    n_random: NRandom = None,
    n_prompts: NPrompts = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = None,
    engine: Engine = "local",
    workers: Workers = None,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Find where, and how little, a direction must be removed.

    Bands of blocks, components, strengths and source directions are searched by refusal score and KL, without
    generating; the best are judged by their answers, and the one that is taken is measured on held-out prompts.
    """
    from ..engine.named import engine_named
    from ..model.provenance import display_name
    from ..recipes.localize import localize as compute
    from ..recipes.options import default_folder
    from ..run.folder import RunInputs, check_model_of_run
    from .tables import print_json, print_least

    source = model.source
    path = run or default_folder(source)
    check_model_of_run(path, source)
    at_most, random = at_least("--n-prompts", n_prompts, 2, 100), at_least("--n-random", n_random, 1, 5)
    tokens = at_least("--max-new-tokens", max_new_tokens, 1, 64)
    at_least("--kl-tokens", kl_tokens, 1, 1), at_least("--n-directions", n_directions, 1, 4)
    folder = output_dir or path / FOLDER
    with engine_named(engine, workers) as elsewhere:
        found, _ = compute(
            RunInputs(model.load(), path, at_most),
            kl_tokens=kl_tokens,
            n_directions=n_directions,
            n_random=random,
            max_new_tokens=tokens,
            batch_size=number_or_auto(batch_size),
            output_dir=folder,
            engine=elsewhere,
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
