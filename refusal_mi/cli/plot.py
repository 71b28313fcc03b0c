"""`refusal-mi plot`: draw a saved run again, without a model."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ..report.folder import RunRecord

STATIC = (".png", ".svg", ".pdf")
WIDTH = 1200


class What(StrEnum):
    """The figures of a run."""

    scores = "scores"
    bypass = "bypass"
    induce = "induce"
    kl = "kl"
    rates = "rates"
    loss = "loss"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plot")(command)


def command(
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
    width: Annotated[int, typer.Option(help="Of a static image, in pixels (a PNG has twice as many).")] = WIDTH,
) -> int:
    """Draw a saved run or analysis again, without a model."""
    from ..plots.save import save_figure
    from ..report.folder import RunRecord
    from .analyze import redraw

    file = output if output is not None and output.suffix in (".html", *STATIC) else None
    if saved.suffix in (".json", ".pt"):
        if file is not None:
            save_figure(_main_figure(saved), file, width=width)
        for drawn in redraw(saved, output) if file is None else [file]:
            typer.echo(str(drawn))
        return 0
    if file is None:
        raise UserError(f"--output is a file ending in .html, {', '.join(STATIC)}, not {output}")
    save_figure(_figure(RunRecord.load(saved), what), file, width=width)
    typer.echo(str(file))
    return 0


def _main_figure(saved: Path) -> "Figure":
    from ..analysis.result import load_result
    from ..plots_analysis import plot

    figure = plot(load_result(saved))
    if isinstance(figure, str):
        raise UserError(f"the main figure of {saved} is a page of HTML: give a folder as --output")
    return figure


def _figure(record: "RunRecord", what: What) -> "Figure":
    from ..plots import plot_losses, plot_rates, plot_score_panels, plot_scores

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
