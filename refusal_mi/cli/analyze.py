"""`refusal-mi analyze`, `plot` and `compare`: analyses of a finished run, drawing again, vectors side by side."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..analysis import KINDS
from ..errors import UserError
from ..options import check_choice, number_or_auto
from ..terminal import say, tell
from .options import (
    SCIENCE_FAILED,
    AsJson,
    BatchSize,
    ModelOptions,
    NPrompts,
    Output,
    OutputDir,
    Seed,
    at_least,
    flat,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ..analysis.result import AnalysisResult
    from ..run.folder import RunInputs
    from ..vectors import Comparison, LabelledVectors

FOLDER = "analysis"


@flat
def analyze(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    what: Annotated[str, typer.Option(help=f"all, or some of these, comma-separated: {', '.join(KINDS)}.")] = "all",
    n_prompts: NPrompts = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Analyze the direction of a run, and draw the results.

    Results are .json and .pt files, figures are .html files.

    An analysis that this run cannot have is named, the others are done, and the exit status is 1.
    """
    from ..recipes.options import default_folder
    from ..run.folder import RunInputs, check_model_of_run
    from .tables import print_findings, print_json, print_lines

    kinds = _kinds(what)
    source = model.source
    path = run or default_folder(source)
    check_model_of_run(path, source)
    inputs = RunInputs(model.load(), path, at_least("--n-prompts", n_prompts, 2, 128), 32, seed or 0)
    found, written, size, n_failed = {}, {}, number_or_auto(batch_size), 0
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
        found[kind] = result
        target = (output_dir or path / FOLDER) / f"{kind}.json"
        result.save(target)
        written[kind] = [str(target), *map(str, draw(result, target.parent))]
    if as_json:
        print_json(written)
    else:
        for kind, result in found.items():
            print_findings(kind, result)
        print_lines(*(file for files in written.values() for file in files))
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
    if not names:
        raise UserError(f"--what {what!r} names no analysis")
    for name in names:
        check_choice("--what", name, ("all", *KINDS))
    return names


def _analyze(kind: str, inputs: "RunInputs", batch_size: int | None) -> "AnalysisResult":
    from dataclasses import replace

    from ..analysis.result import analysis_module
    from ..text.batches import with_smaller_batches

    module = analysis_module(kind)
    return with_smaller_batches(lambda size: module.from_run(replace(inputs, batch_size=size)), batch_size)


STATIC = (".png", ".svg", ".pdf")


class FigureName(StrEnum):
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
    output: Output = None,
    output_dir: OutputDir = None,
    figure: Annotated[
        FigureName,
        typer.Option(help="Of a run. scores: the three per-layer scores; one of them; rates; loss.", metavar="NAME"),
    ] = FigureName.scores,
    width: Annotated[
        int | None, typer.Option(help="Of a static image, in pixels (a PNG has twice as many). Default 1200.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Draw a saved run or analysis again, without a model.

    Of a run, one figure (--figure) to --output FILE.html, or .png, .svg or .pdf through a local Chromium; without it to
    RUN_DIR/{figure}.html. Of a result, its main figure, or without --output all of them, beside it or in --output-dir.
    """
    from ..figures.save import save_figure
    from ..loaded import load_run

    if width is not None and not 100 <= width <= 10_000:
        raise UserError(f"--width is from 100 to 10000 pixels, not {width}")
    file = output if output is not None and output.suffix in (".html", *STATIC) else None
    if saved.suffix in (".json", ".pt"):
        if file is not None:
            save_figure(_main_figure(saved), file, width=width)
        _tell_files(redraw(saved, output_dir or output) if file is None else [file], as_json)
        return 0
    if output is not None and file is None:
        raise UserError(f"--output is a file ending in .html, {', '.join(STATIC)}, not {output}")
    shown = load_run(saved)
    file = file or (output_dir or shown.path) / f"{figure.value}.html"
    save_figure(shown.figures[figure.value], file, width=width)
    _tell_files([file], as_json)
    return 0


def _tell_files(files: list[Path], as_json: bool) -> None:
    from .tables import print_json

    if as_json:
        print_json({"files": list(map(str, files))})
        return
    for file in files:
        tell(file)


def _main_figure(saved: Path) -> "Figure":
    from ..analysis.result import load_result, plot

    figure = plot(load_result(saved))
    if isinstance(figure, str):
        raise UserError(f"the main figure of {saved} is a page of HTML: give a folder as --output")
    return figure


WHOLE_MATRIX = 12
"""Up to so many vectors are all compared with each other; more row by row with the first file's."""


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="A.pt B.pt ...", help="[d], [1, d] or [n, d]; any float type. A run folder: its vector."
        ),
    ],
    normalize_across: Annotated[
        bool,
        typer.Option("--normalize-across", help="Give the files one norm per row, as CAA does, into --output-dir."),
    ] = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Show the cosine similarity of every two vectors."""
    from dataclasses import replace

    from ..files import check_not_input, write_tensors
    from ..vectors import compare, read_vectors
    from ..vectors import normalize_across as shared_norm
    from .tables import print_json

    if normalize_across and output_dir is None:
        raise UserError("--normalize-across writes vectors: say where with --output-dir")
    if output_dir is not None and not normalize_across:
        raise UserError("--output-dir is for --normalize-across; cosines go to the terminal (--json for a file)")
    stacks = [
        replace(read_vectors(_vector_file(file)), name=name)
        for file, name in zip(files, _names_apart(files), strict=True)
    ]
    if normalize_across and output_dir is not None:
        names = [f"{file.name}.pt" if file.is_dir() else file.name for file in files]
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


def _vector_file(path: Path) -> Path:
    """The file of vectors that a path names: itself, or that of a run folder."""
    if not path.is_dir():
        return path
    names = ("direction.pt", "refusal_vector.pt")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} holds neither {' nor '.join(names)}: finish its run, or name a file")
    return found


def _names_apart(files: list[Path]) -> list[str]:
    """Names of files and folders, with as many of the folders above them as tell them apart."""
    places = [file.resolve() if file.is_dir() else file.absolute() for file in files]
    short = [place if place.is_dir() else place.with_suffix("") for place in places]
    paths = short if len(set(short)) == len(set(places)) else places
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    named = (["/".join(path.parts[-depth:]) for path in paths] for depth in depths)
    return next(names for names in named if len(set(names)) == len(set(paths)))


def _print(comparison: "Comparison", stacks: "list[LabelledVectors]") -> None:
    from .tables import print_lines, print_matrix

    cosines, norms = comparison.cosines.tolist(), comparison.norms.tolist()
    if len(comparison.labels) <= WHOLE_MATRIX:
        numbers = [[*map(_number, row), f"{norm:.4g}"] for row, norm in zip(cosines, norms, strict=True)]
        named = list(zip(comparison.labels, numbers, strict=True))
        print_matrix("cosine", [*comparison.labels, "norm"], named)
        return
    starts = [sum(len(stack.rows) for stack in stacks[:index]) for index in range(len(stacks))]
    rows = []
    for row in range(max(len(stack.rows) for stack in stacks)):
        places = [
            start + min(row, len(stack.rows) - 1) if row < len(stack.rows) or len(stack.rows) == 1 else None
            for start, stack in zip(starts, stacks, strict=True)
        ]
        first = places[0]
        cells = ["" if first is None or place is None else _number(cosines[first][place]) for place in places[1:]]
        rows.append((str(row), cells))
    print_lines(f"{len(comparison.labels)} vectors; cosine of every layer with {stacks[0].name}; all of them: --json")
    print_matrix("layer", [stack.name for stack in stacks[1:]], rows)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"
