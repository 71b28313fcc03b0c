"""`refusal-mi compare-methods`: one direction or several, by which method, at what cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..estimators.names import parse_methods
from ..options import number_or_auto
from ..terminal import say
from .options import (
    AsJson,
    BatchSize,
    Engine,
    Fresh,
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
    from ..run.methods import MethodsResult
    from ..text.prompts import PromptSet

HARMFUL_SETS = (
    *("harmful", "advbench", "harmbench", "jailbreakbench", "strongreject", "maliciousinstruct"),
    *("xstest-unsafe", "or-bench-toxic"),
)
FOLDER, METHODS = "methods", "mean,projected,median,pca,lda,ranks,peel,kmeans"


@flat
def compare_methods(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Estimators, ranks, peel:3, kmeans:2, category:2, rdo, cone:2, module:function; separated by commas."
        ),
    ] = METHODS,
    k: Annotated[
        int, typer.Option("--k", help="Most directions of ranks, peel, kmeans, category and cone without a number.")
    ] = 4,
    kl_tokens: Annotated[int, typer.Option(help="Tokens of the plain answers that the KL goes over.")] = 1,
    n_places: Annotated[int, typer.Option(help="Layers at which every method is tried.")] = 4,
    over_refusal: Annotated[
        str | None,
        typer.Option(
            metavar="SETS", help="Harmless sets beside the held-out ones: xstest, or-bench, files; with commas."
        ),
    ] = None,
    capability: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks asked too: everyday, or of refusal-mi capability; with commas."),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(metavar="N", help="Directions found N times: from all training prompts, then from drawn ones."),
    ] = 1,
    n_random: NRandom = None,
    n_prompts: NPrompts = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = None,
    engine: Engine = "local",
    workers: Workers = None,
    output_dir: OutputDir = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> int:
    """Compare methods, and one direction with several.

    Every method's directions are removed from all writes, at several strengths; costs are compared where all leave as
    many refusals on held-out prompts as one difference of means. What was killed goes on where it was.
    """
    from ..engine.named import engine_named
    from ..model.provenance import display_name
    from ..recipes.methods import check_methods
    from ..recipes.methods import compare_methods as compute
    from ..recipes.options import default_folder
    from ..run.folder import RunInputs, check_model_of_run
    from ..run.stages import RunFolder
    from .methods_tables import print_methods
    from .tables import print_json

    source = model.source
    at_most, random = at_least("--n-prompts", n_prompts, 2, 100), at_least("--n-random", n_random, 1, 5)
    tokens = at_least("--max-new-tokens", max_new_tokens, 1, 64)
    at_least("--kl-tokens", kl_tokens, 1, 1), at_least("--n-places", n_places, 1, 4)
    asked = parse_methods(methods, at_least("--k", k, 1, 4))
    draws = at_least("--seeds", seeds, 1, 1)
    sets, tasks = harmless_sets(over_refusal), task_names(capability)
    path = run or default_folder(source)
    check_model_of_run(path, source)
    folder = RunFolder(output_dir or path / FOLDER, fresh, say)
    folder.check_writable()
    check_methods(asked)
    with engine_named(engine, workers) as elsewhere:
        found = compute(
            RunInputs(model.load(), path, at_most),
            asked,
            folder=folder,
            kl_tokens=kl_tokens,
            n_places=n_places,
            n_random=random,
            max_new_tokens=tokens,
            batch_size=number_or_auto(batch_size),
            over_refusal=sets,
            capability=tasks,
            n_draws=draws,
            engine=elsewhere,
        )
    _draw(found, display_name(source), folder.path)
    print_json(found) if as_json else print_methods(found, folder.path)
    return 0


def harmless_sets(text: str | None) -> "list[PromptSet]":
    """The sets that --over-refusal names."""
    from ..text.prompts import load_prompts

    parts = _parts("--over-refusal", text, "such as xstest,or-bench")
    for each in parts:
        if each.lower() in HARMFUL_SETS or each.startswith("organism_harmful"):
            raise UserError(f"--over-refusal takes sets of harmless prompts, and {each} is one of harmful ones")
    return [load_prompts(each) for each in parts]


def task_names(text: str | None) -> list[str]:
    """The tasks that --capability names; all but `everyday` need lm-evaluation-harness."""
    from ..harness.tasks import CHOICES, check_tasks

    names = _parts("--capability", text, "such as everyday,gsm8k")
    if set(names) - {CHOICES}:
        check_tasks(names)
    return names


def _parts(option: str, text: str | None, usage: str) -> list[str]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} takes names, each once, {usage}, not {text!r}")
    return parts


def _draw(found: "MethodsResult", name: str, folder: Path) -> None:
    from ..figures.methods import plot_beside, plot_cost, plot_ratios
    from ..figures.save import save_figures

    figures = {"cost": plot_cost(found, model=name), "ratios": plot_ratios(found, model=name)}
    save_figures(figures | {"beside": plot_beside(found, model=name)}, folder)
