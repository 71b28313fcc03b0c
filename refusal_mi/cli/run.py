"""`refusal-mi run`: from a model to its refusal direction, with evidence."""

import sys
from typing import Annotated

import typer

from ..errors import UserError
from .arguments import AsJson, BatchSize, OutputDir, parse_batch_size, parse_tokens
from .bundles import JudgeOptions, ModelOptions, TemplateOptions, ThresholdOptions, flat

SCIENCE_FAILED = 1


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(command)


@flat
def command(
    *,
    model: ModelOptions,
    harmful: Annotated[str | None, typer.Option(help="A set to be split, or TRAIN,VAL,TEST: names or files.")] = None,
    harmless: Annotated[str | None, typer.Option(help="The same for harmless prompts.")] = None,
    eval_set: Annotated[str | None, typer.Option(help="Harmful prompts to report on instead of TEST.")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column that holds the instruction, in files and other hub sets.")
    ] = None,
    text_set: Annotated[str | None, typer.Option(help="Plain texts for CE loss.")] = None,
    instruction_set: Annotated[str | None, typer.Option(help="Answered instructions for CE loss.")] = None,
    n_train: Annotated[int, typer.Option(help="Training prompts a side.")] = 128,
    n_val: Annotated[int, typer.Option(help="Validation prompts a side.")] = 32,
    n_test: Annotated[int, typer.Option(help="Held-out prompts a side.")] = 100,
    n_ce: Annotated[int, typer.Option(help="At most this many texts of each CE set.")] = 4096,
    n_random: Annotated[int, typer.Option(help="Random directions of equal norm, as controls.")] = 1,
    seed: Annotated[int, typer.Option(help="Of every sample.")] = 42,
    filter_prompts: Annotated[
        bool, typer.Option("--filter/--no-filter", help="Keep harmful prompts that are refused, harmless answered.")
    ] = True,
    template: TemplateOptions,
    response_prefix: Annotated[
        str | None, typer.Option(help="Text that every answer begins with; default: found by generating.")
    ] = None,
    refusal_tokens: Annotated[
        str | None, typer.Option(help="Token ids of the refusal score; default: discovered on TRAIN.")
    ] = None,
    thresholds: ThresholdOptions,
    search: Annotated[
        str,
        typer.Option(
            help="exact, or staged: screen the candidates on few prompts and measure only those that can win."
        ),
    ] = "exact",
    skip_pruned: Annotated[
        bool, typer.Option("--skip-pruned", help="Do not run candidates of the layers that --prune-layers leaves out.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of every answer; default 512, for the embedded model 64.")
    ] = None,
    judge: JudgeOptions,
    steps: Annotated[str, typer.Option(help="Up to which of these to go, comma-separated.")] = (
        "directions,selection,completions,loss"
    ),
    directions: Annotated[
        str | None,
        typer.Option(
            "--directions", "--vectors-ablated", help="0-2: ablate the candidates of ranks 0 and 2 instead of the best."
        ),
    ] = None,
    multi: Annotated[
        str | None,
        typer.Option(
            help="span (default): project out the span of --directions; sequential: one after the other, as "
            "published, which leaves half of the first one's scale where two have cosine 0.79."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small samples, marked as such in every file.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")] = False,
    batch_size: BatchSize = "auto",
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Find the direction that mediates refusal, and test it.

    What it does to answers and to CE loss is measured beside random directions, and written into a report.
    """
    from ..pipelines.arditi import run
    from ..pipelines.defaults import default_folder, default_options
    from ..pipelines.options import RunOptions
    from ..pipelines.several import check_multi, parse_directions
    from ..report import identity_of, list_combinations, write_report
    from ..stages import RunFolder
    from .tables import print_json, print_summary

    ranks = () if directions is None else parse_directions(directions)
    if multi is not None and not ranks:
        raise UserError("--multi says how several directions are ablated: name them with --directions")
    check_multi(multi or "span")
    defaults = default_options(model.source)
    options = RunOptions(
        harmful=harmful or defaults.harmful,
        harmless=harmless or defaults.harmless,
        eval_set=eval_set,
        column=column,
        text_set=text_set or defaults.text_set,
        instruction_set=instruction_set or defaults.instruction_set,
        n_train=n_train,
        n_val=n_val,
        n_test=n_test,
        n_ce=n_ce,
        n_random=n_random,
        seed=seed,
        filter_prompts=filter_prompts,
        system=template.system,
        template_kwargs=template.kwargs,
        response_prefix=response_prefix,
        refusal_tokens=parse_tokens(refusal_tokens),
        thresholds=thresholds.rule,
        search=search,  # type: ignore[arg-type]
        skip_pruned=skip_pruned,
        max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
        judge=judge.name,
        judge_model=judge.judge_model,
        steps=tuple(step.strip() for step in steps.split(",")),  # type: ignore[misc]
        batch_size=parse_batch_size(batch_size),
    )
    options = options.shortened() if quick else options
    path = output_dir or default_folder(model.source, quick=quick)
    folder = RunFolder(path, fresh, lambda message: print(message, file=sys.stderr))
    folder.check_writable()
    before = identity_of(path)
    summary = run(
        model.load(),
        model.source,
        options,
        folder,
        directions=ranks,
        multi=multi or "span",  # type: ignore[arg-type]
    )
    report = write_report(path / summary["combination"]["label"] if "combination" in summary else path)
    if "combination" in summary:
        list_combinations(path, before)
    if as_json:
        print_json({**summary, "report": str(report)})
    else:
        print_summary(summary, report)
    return SCIENCE_FAILED if summary["status"] == "no candidate survives" else 0
