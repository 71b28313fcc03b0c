"""`refusal-mi analyze`, `plot` and `compare`: analyses of a finished run, drawing again, vectors side by side."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..analysis import KINDS
from ..errors import UserError
from ..options import number_or_auto
from ..terminal import say, tell
from .options import SCIENCE_FAILED, AsJson, BatchSize, ModelOptions, flat

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ..analysis.result import AnalysisResult
    from ..run.folder import RunInputs, RunRecord
    from ..vectors import Comparison, LabelledVectors

FOLDER = "analysis"


@flat
def analyze(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    what: Annotated[str, typer.Option(help=f"all, or some of these, comma-separated: {', '.join(KINDS)}.")] = "all",
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts a side, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of every control.")] = 0,
    batch_size: BatchSize = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default RUN/analysis.")] = None,
    as_json: AsJson = False,
) -> int:
    """Analyze the direction of a run, and draw the results.

    Results are .json and .pt files, figures are .html files.

    An analysis that this run cannot have is named, the others are done, and the exit status is 1.
    """
    from ..model.loading import model_alias
    from ..run.folder import RunInputs, check_model_of_run
    from .tables import print_facts, print_json

    kinds = _kinds(what)
    source = model.source
    path = run or Path("runs") / model_alias(source)
    check_model_of_run(path, source)
    if n_prompts < 2:
        raise UserError(f"--n-prompts must be at least 2, not {n_prompts}")
    inputs = RunInputs(model.load(), path, n_prompts, 32, seed)
    written, size, n_failed = {}, number_or_auto(batch_size), 0
    for kind in kinds:
        say(kind)
        try:
            result = _analyze(kind, inputs, size)
        except UserError as error:
            if len(kinds) == 1:
                raise
            say(f"no {kind}: {error}")
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
    from ..analysis.result import draw_all
    from ..figures.save import save_figures
    from ..files import write_text

    drawn = draw_all(result)
    for name, why in drawn.left_out.items():
        say(f"no figure {name}: {why}")
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
    from ..text.batches import with_smaller_batches

    module = analysis_module(kind)
    return with_smaller_batches(lambda size: module.from_run(replace(inputs, batch_size=size)), batch_size)


STATIC = (".png", ".svg", ".pdf")


class What(StrEnum):
    """The figures of a run."""

    scores = "scores"
    bypass = "bypass"
    induce = "induce"
    kl = "kl"
    rates = "rates"
    loss = "loss"


def plot(
    saved: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|RESULT.json", help="The folder of a run, or a result of analyze.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Of a run: FILE.html, or FILE.png, .svg or .pdf through a local Chromium. "
            "Of a result: the same, for its main figure, or a folder for all; default: all, beside it."
        ),
    ] = None,
    what: Annotated[What, typer.Option(help="scores: the three per-layer scores; one of them; rates; loss.")] = (
        What.scores
    ),
    width: Annotated[
        int | None,
        typer.Option(
            min=100, max=10_000, help="Of a static image, in pixels (a PNG has twice as many); 1200 by default."
        ),
    ] = None,
) -> int:
    """Draw a saved run or analysis again, without a model."""
    from ..figures.save import save_figure
    from ..run.folder import RunRecord

    file = output if output is not None and output.suffix in (".html", *STATIC) else None
    if saved.suffix in (".json", ".pt"):
        if file is not None:
            save_figure(_main_figure(saved), file, width=width)
        for drawn in redraw(saved, output) if file is None else [file]:
            tell(drawn)
        return 0
    if file is None:
        raise UserError(f"--output is a file ending in .html, {', '.join(STATIC)}, not {output}")
    save_figure(_figure(RunRecord.load(saved), what), file, width=width)
    tell(file)
    return 0


def _main_figure(saved: Path) -> "Figure":
    from ..analysis.result import load_result, plot

    figure = plot(load_result(saved))
    if isinstance(figure, str):
        raise UserError(f"the main figure of {saved} is a page of HTML: give a folder as --output")
    return figure


def _figure(record: "RunRecord", what: What) -> "Figure":
    from ..figures.effects import plot_losses, plot_rates
    from ..figures.scores import plot_score_panels, plot_scores

    model = record.model_name
    if what is What.rates:
        if not record.sides:
            raise UserError(f"{record.path} has no judged completions: run its step completions first")
        return plot_rates(record.sides, model=model)
    if what is What.loss:
        if not record.losses:
            raise UserError(f"{record.path} has no CE losses: run its step loss first")
        return plot_losses(record.losses, model=model)
    if record.scores is None or record.selection is None:
        raise UserError(f"{record.path} has no scores: run its step selection first")
    chosen = record.selection.survivors[0] if record.selection.survivors else None
    if what is What.scores:
        return plot_score_panels(
            record.scores, chosen=chosen, thresholds=record.thresholds, tokens=record.tokens, model=model
        )
    return plot_scores(
        record.scores,
        measure=what.value,  # type: ignore[arg-type]
        chosen=chosen,
        thresholds=record.thresholds,
        tokens=record.tokens,
        model=model,
    )


MAX_COLUMNS = 12


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="A.pt B.pt ...", help="[d], [1, d] or [n, d]; any float type.")
    ],
    normalize_across: Annotated[
        bool, typer.Option("--normalize-across", help="Give the files one norm per row, as CAA does for behaviors.")
    ] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Where --normalize-across writes the vectors.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show the cosine similarity of every two vectors."""
    from ..files import check_not_input, write_tensors
    from ..vectors import compare, read_vectors
    from ..vectors import normalize_across as shared_norm
    from .tables import print_json

    if normalize_across and output_dir is None:
        raise UserError("--normalize-across writes vectors: say where with --output-dir")
    if output_dir is not None and not normalize_across:
        raise UserError("--output-dir is for --normalize-across; cosines go to the terminal (--json for a file)")
    stacks = [read_vectors(file) for file in files]
    if normalize_across and output_dir is not None:
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise UserError(f"--normalize-across needs files of different names, not {', '.join(names)}")
        for name in names:
            check_not_input(output_dir / name, files)
        stacks = shared_norm(stacks)
        for name, stack in zip(names, stacks, strict=True):
            rows = stack.rows.float()
            write_tensors(output_dir / name, rows[0] if len(rows) == 1 else rows)
    comparison = compare(stacks)
    print_json(comparison.describe()) if as_json else _print(comparison, stacks)
    return 0


def _print(comparison: "Comparison", stacks: "list[LabelledVectors]") -> None:
    from .tables import Console, Table

    console = Console()
    if len(comparison.labels) <= MAX_COLUMNS:
        table = Table("cosine", *comparison.labels, "norm")
        for label, row, norm in zip(
            comparison.labels, comparison.cosines.tolist(), comparison.norms.tolist(), strict=True
        ):
            table.add_row(label, *(_number(value) for value in row), f"{norm:.4g}")
    else:
        table = Table("row", *(f"{stack.name} with {stacks[0].name}" for stack in stacks[1:]))
        starts = [sum(len(stack.rows) for stack in stacks[:index]) for index in range(len(stacks))]
        for row in range(max(len(stack.rows) for stack in stacks)):
            places = [start + min(row, len(stack.rows) - 1) for start, stack in zip(starts, stacks, strict=True)]
            table.add_row(str(row), *(_number(comparison.cosines[places[0], place].item()) for place in places[1:]))
        console.print(f"{len(comparison.labels)} vectors, row by row; the whole matrix: --json", highlight=False)
    console.print(table)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"
