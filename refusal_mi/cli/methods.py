"""`refusal-mi compare-methods`: one direction or several, by which method, at what cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..estimators.names import parse_methods
from ..options import number_or_auto
from ..terminal import say
from .options import AsJson, BatchSize, Fresh, ModelOptions, flat

if TYPE_CHECKING:
    from ..recipes.methods import MethodsResult

FOLDER, METHODS = "methods", "mean,projected,median,pca,lda,ranks,peel,kmeans"


@flat
def compare_methods(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder to compare in; default runs/{alias}.")] = None,
    methods: Annotated[str, typer.Option(help="Estimators, ranks, peel:3, kmeans:2, module:function.")] = METHODS,
    k: Annotated[int, typer.Option(min=1, help="Most directions of ranks, peel and kmeans.")] = 4,
    kl_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the plain answers that the KL goes over.")] = 1,
    n_places: Annotated[int, typer.Option(min=1, help="Layers of the search that are tried.")] = 4,
    n_random: Annotated[int, typer.Option(min=1, help="Random subspaces of each rank.")] = 5,
    n_prompts: Annotated[int, typer.Option(help="Prompts a side, at most.")] = 100,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of every judged answer.")] = 64,
    batch_size: BatchSize = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default RUN/methods.")] = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> int:
    """Compare methods, and one direction with several.

    Every method's directions are removed from all writes, at several strengths; costs are compared where all leave as
    many refusals on held-out prompts as one difference of means. What was killed goes on where it was.
    """
    from ..model.loading import model_alias
    from ..model.provenance import display_name
    from ..recipes.methods import compare_methods as compute
    from ..run.folder import RunInputs, check_model_of_run
    from ..run.stages import RunFolder
    from .tables import print_json, print_methods

    source, asked = model.source, parse_methods(methods, k)
    path = run or Path("runs") / model_alias(source)
    check_model_of_run(path, source)
    if n_prompts < 2:
        raise UserError(f"--n-prompts must be at least 2, not {n_prompts}")
    folder = RunFolder(output_dir or path / FOLDER, fresh, say)
    folder.check_writable()
    found = compute(
        RunInputs(model.load(), path, n_prompts),
        asked,
        folder=folder,
        kl_tokens=kl_tokens,
        n_places=n_places,
        n_random=n_random,
        max_new_tokens=max_new_tokens,
        batch_size=number_or_auto(batch_size),
    )
    _draw(found, display_name(source), folder.path)
    print_json(found) if as_json else print_methods(found, folder.path)
    return 0


def _draw(found: "MethodsResult", name: str, folder: Path) -> None:
    from ..figures.methods import plot_cost, plot_ratios
    from ..figures.save import save_figures

    save_figures({"cost": plot_cost(found, model=name), "ratios": plot_ratios(found, model=name)}, folder)
