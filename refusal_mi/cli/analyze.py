"""`refusal-mi analyze`: analyses of a finished run, saved with their figures; and drawing them again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..analysis import KINDS
from ..errors import UserError
from .arguments import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Model,
    ModelPath,
    Revision,
    one_model,
    parse_batch_size,
    quiet_load,
)

if TYPE_CHECKING:
    from ..analysis.inputs import RunInputs
    from ..analysis.result import AnalysisResult

FOLDER = "analysis"
SCIENCE_FAILED = 1


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("analyze")(command)


def command(
    model: Model = None,
    model_path: ModelPath = None,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    what: Annotated[str, typer.Option(help=f"all, or some of these, comma-separated: {', '.join(KINDS)}.")] = "all",
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts a side, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of every control.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default RUN/analysis.")] = None,
    as_json: AsJson = False,
) -> int:
    """Analyze the direction of a run, and draw the results.

    Results are .json and .pt files, figures are .html files.

    An analysis that this run cannot have is named, the others are done, and the exit status is 1.
    """
    from ..analysis.inputs import RunInputs, check_model_of_run
    from ..models import model_alias
    from .tables import print_facts, print_json

    kinds = _kinds(what)
    source = one_model(model, model_path)
    path = run or Path("runs") / model_alias(source)
    check_model_of_run(path, source)
    if n_prompts < 2:
        raise UserError(f"--n-prompts must be at least 2, not {n_prompts}")
    inputs = RunInputs(quiet_load(source, revision, device, dtype), path, n_prompts, 32, seed)
    written, size, n_failed = {}, parse_batch_size(batch_size), 0
    for kind in kinds:
        typer.echo(kind, err=True)
        try:
            result = _analyze(kind, inputs, size)
        except UserError as error:
            if len(kinds) == 1:
                raise
            typer.echo(f"no {kind}: {error}", err=True)
            n_failed += 1
            continue
        target = (output_dir or path / FOLDER) / f"{kind}.json"
        result.save(target)
        written[kind] = [str(target), *map(str, draw(result, target.parent))]
    print_json(written) if as_json else print_facts(written)
    return SCIENCE_FAILED if n_failed else 0


def redraw(result: Path, output_dir: Path | None = None) -> list[Path]:
    """Draw a saved result again, without a model; the figures go beside it unless told otherwise."""
    from ..analysis.result import load_result

    return draw(load_result(result), output_dir or Path(result).parent)


def draw(result: "AnalysisResult", folder: Path) -> list[Path]:
    """Write every figure that a result has as HTML that needs no network, with plotly once beside them."""
    from ..files import write_text
    from ..plots.save import save_figures
    from ..plots_analysis import draw_all

    drawn = draw_all(result)
    for name, why in drawn.left_out.items():
        typer.echo(f"no figure {name}: {why}", err=True)
    pages = {name: page for name, page in drawn.figures.items() if isinstance(page, str)}
    for name, page in pages.items():
        write_text(folder / f"{name}.html", page)
    plotted = {name: figure for name, figure in drawn.figures.items() if not isinstance(figure, str)}
    files = save_figures(plotted, folder) if plotted else []
    return [folder / name for name in [*files, *(f"{name}.html" for name in pages)]]


def _kinds(what: str) -> list[str]:
    names = list(KINDS) if what == "all" else [name.strip() for name in what.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise UserError(f"no such analysis: {what!r}; --what takes all, or some of {', '.join(KINDS)}")
    return names


def _analyze(kind: str, inputs: "RunInputs", batch_size: int | None) -> "AnalysisResult":
    from dataclasses import replace

    from ..analysis.result import analysis_module
    from ..memory import with_smaller_batches

    module = analysis_module(kind)
    return with_smaller_batches(lambda size: module.from_run(replace(inputs, batch_size=size)), batch_size)
