"""`refusal-mi run`, `combos`, `reproduce`, `model-info`: from a model to its direction, with evidence."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..options import MEANINGS, in_words, number_or_auto, rank_numbers
from ..run.options import CombosOptions, RunOptions
from ..terminal import say
from .options import (
    SCIENCE_FAILED,
    AsJson,
    BatchSize,
    Device,
    Engine,
    Fresh,
    Given,
    JudgeOptions,
    ModelOptions,
    Multi,
    OutputDir,
    Ranks,
    TemplateOptions,
    Workers,
    flat,
)

if TYPE_CHECKING:
    from ..model.points import HookedModel
    from ..run.combos import CombosResult, CombosTest, ValidationRow
    from ..text.chat import ChatFormat
    from ..text.prompts import PromptSet


@flat
def run(
    *,
    model: ModelOptions,
    given: Given[RunOptions],
    directions: Ranks = None,
    multi: Multi = None,
    images: Annotated[bool, typer.Option("--images", help=MEANINGS["images"])] = False,
    engine: Engine = "local",
    workers: Workers = None,
    fresh: Fresh = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Find the direction that mediates refusal, and test it.

    What it does to answers and to CE loss is measured beside random directions, and written into a report.
    """
    from .. import files
    from ..engine.named import engine_named
    from ..figures.save import check_images
    from ..recipes.arditi import run
    from ..recipes.combinations import check_multi
    from ..recipes.options import default_folder, default_options
    from ..report.page import identity_of, list_combinations, write_report
    from ..run.record import DOES_NOT_REFUSE
    from ..run.stages import RunFolder
    from .tables import print_json, print_summary

    ranks = () if directions is None else rank_numbers(directions)
    if multi is not None and not ranks:
        raise UserError("--multi says how several directions are ablated: name them with --directions")
    check_multi(multi or "span")
    options = given.over(default_options(model.source))
    options = options.shortened() if options.quick else options
    path = output_dir or default_folder(model.source, quick=options.quick)
    folder = RunFolder(path, fresh, say)
    folder.check_writable()
    if images:
        check_images()
    if ranks:
        say(f"ablated together: {in_words(ranks)}")
    before = identity_of(path)
    with engine_named(engine, workers) as elsewhere:
        summary = run(
            model.load(),
            model.source,
            options,
            folder,
            directions=ranks,
            multi=multi or "span",  # type: ignore[arg-type]
            engine=elsewhere,
        )
    report = write_report(path if summary.combination is None else path / summary.combination.label)
    if summary.combination is not None:
        list_combinations(path, before)
    if images:
        _draw_images(path)
    if as_json:
        print_json({**files.as_json(summary), "report": str(report)})
    else:
        print_summary(summary, report)
    return SCIENCE_FAILED if summary.status in ("no candidate survives", DOES_NOT_REFUSE) else 0


def _draw_images(path: Path) -> None:
    from ..figures.save import save_figure
    from ..loaded import load_run
    from ..recipes.search import FOLDER, PLOTS

    figures = load_run(path).figures
    for stem, measure in PLOTS.items():
        if measure in figures:
            for kind in ("png", "pdf"):
                save_figure(figures[measure], path / FOLDER / f"{stem}.{kind}")


@flat
def combos(
    *,
    model: ModelOptions,
    options: CombosOptions,
    judge: JudgeOptions,
    quick: Annotated[bool, typer.Option("--quick", help=MEANINGS["quick"])] = False,
    engine: Engine = "local",
    workers: Workers = None,
    fresh: Fresh = False,
    batch_size: BatchSize = None,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Choose directions to ablate together, and test them.

    Every single direction and combination is ablated on validation prompts, the winner on held-out ones.

    Prompts, search and options are those of the run in the run folder; without one, of a run with the defaults.
    """
    from dataclasses import replace

    from ..engine.named import engine_named
    from ..figures.effects import draw_combos
    from ..recipes.combinations import run_combos
    from ..recipes.options import default_folder
    from ..report.page import identity_of, list_combinations
    from ..run.stages import RunFolder
    from .tables import print_json

    path = output_dir or default_folder(model.source, quick=quick)
    run_options = replace(_run_options(path, model.source, quick), batch_size=number_or_auto(batch_size))
    if judge.judge is not None:
        run_options = replace(
            run_options, judge=judge.name, judge_model=judge.judge_model, judge_labels=judge.judge_labels
        )
    elif judge.judge_model is not None or judge.judge_labels is not None:
        given = {"judge_model": judge.judge_model, "judge_labels": judge.judge_labels}
        run_options = replace(run_options, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    folder = RunFolder(path, fresh, say)
    folder.check_writable()
    before = identity_of(path)
    with engine_named(engine, workers) as elsewhere:
        result = run_combos(model.load(), model.source, run_options, folder, options, elsewhere)
    if result.baseline is not None:
        draw_combos(result, path)
        list_combinations(path, before)
    if as_json:
        print_json(result)
    else:
        _print(result, path)
    return 0 if result.status == "done" else SCIENCE_FAILED


def _run_options(path: Path, source: str, quick: bool) -> RunOptions:
    from ..files import read_record
    from ..recipes.options import default_options
    from ..run.record import RUN, RunInfo

    if (path / RUN).exists():
        return read_record(path / RUN, RunInfo).options
    options = default_options(source)
    return options.shortened() if quick else options


def reproduce(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    device: Device = "auto",
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Run a finished run again, and compare every file.

    MATCH, and what was not repeated (combinations, combos), or the first difference and status 1. The second run is
    thrown away, or kept in --output-dir.
    """
    import tempfile
    from contextlib import nullcontext

    from ..recipes.reproduce import read_run
    from ..recipes.reproduce import reproduce as run_again
    from ..run.stages import RunFolder
    from .tables import print_json, print_lines

    again = ModelOptions.of_run(read_run(run_dir).model, device)
    if output_dir is not None and any(output_dir.glob("*")):
        raise UserError(f"{output_dir} is not empty: the second run needs a folder of its own")
    place = tempfile.TemporaryDirectory() if output_dir is None else nullcontext(str(output_dir))
    with place as folder:
        found = run_again(again.load(), again.source, run_dir, RunFolder(Path(folder), False, say))
    if as_json:
        print_json({"matches": found.matches, **vars(found)})
    else:
        for note in found.notes:
            say(f"note: {note}")
        same_files = f"MATCH: {found.n_files} files hold what they held"
        print_lines(same_files if found.matches else f"DIFFERENT: {found.difference}")
        if found.not_repeated:
            print_lines(f"not repeated: {', '.join(found.not_repeated)}")
    return 0 if found.matches else SCIENCE_FAILED


def _print(result: "CombosResult", path: Path) -> None:
    from .tables import Console, Table

    console = Console()
    if result.baseline is None:
        console.print(f"{result.status}: {result.explanation}", highlight=False)
        return
    table = Table("ranks", "position, layer", "bypass", "KL", "refused", "degenerate", "CE loss")

    def add(row: "ValidationRow", name: str, places: str = "") -> None:
        rates = [f"{rate.value:.2f}" for rate in (row.refusal, row.degenerate)]
        loss = f"{row.ce_loss[result.text_set].ce_loss:.4f}"
        table.add_row(name, places, f"{row.bypass:.2f}", f"{row.kl_nats:.4f}", *rates, loss)

    add(result.baseline, result.baseline.label)
    for each in result.combinations:
        places = " + ".join(f"{place.pos}, {place.layer}" for place in each.combination.directions)
        add(each.measured, each.measured.label + (" *" if each.measured.label == result.winner else ""), places)
    for row in result.random:
        add(row, f"random {row.label.partition('_random_')[2]}")
    n = result.n_validation
    console.print(
        f"validation: {n['harmful']} harmful, {n['harmless']} harmless prompts; * the winner", highlight=False
    )
    console.print(table)
    for ranks in result.skipped:
        console.print(f"left out: {ranks.reason}", highlight=False, markup=False)
    if result.test is None:
        console.print(result.status, highlight=False)
    else:
        _print_test(console, result, result.test)
    console.print(f"combos.json and combos.html: {path}", highlight=False, soft_wrap=True)


def _print_test(console: Any, result: "CombosResult", test: "CombosTest") -> None:
    from .tables import print_rates

    named = {"plain model": test.baseline, f"winner, {result.winner}": test.winner}
    if test.single_best is not None:
        named[f"best single, {result.single_best}"] = test.single_best
    named |= {f"random span {seed}": effect for seed, effect in enumerate(test.random)}
    print_rates(console, f"held-out {test.set_name}, n = {test.n}", named)
    gap = test.winner_minus_single
    if gap is not None:
        shown = f"{gap.refusal_rate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        console.print(f"winner minus best single, refusal rate: {shown}", highlight=False, markup=False)


N_PROBE_PROMPTS = 32


@flat
def model_info(
    *,
    model: ModelOptions,
    template: TemplateOptions,
    discover: Annotated[
        bool, typer.Option(help="Run the model to find its response prefix and refusal tokens.")
    ] = True,
    as_json: AsJson = False,
) -> int:
    """Show what this package sees in a model.

    That is its template, post-instruction tokens, refusal tokens, layers, writers, dtype and memory.
    """
    from .. import files
    from ..generation import discover_response_prefix
    from ..model.points import explain_writes, parameters_of, write_hooks
    from ..model.provenance import describe_model
    from ..recipes.prompts import N_PREFIX_PROMPTS
    from .tables import print_facts, print_json

    source, loaded = model.source, model.load()
    chat = template.chat(loaded)
    if discover:
        mixed = [text for prompts in _sets(source) for text in prompts.instructions[: N_PREFIX_PROMPTS // 2]]
        chat = chat.with_response_prefix(discover_response_prefix(loaded, chat, mixed))
    record = describe_model(loaded, source)
    parameters = parameters_of(loaded)
    facts: dict[str, Any] = {
        **files.as_json(record),
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "weight_mib": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
        **files.as_json(chat.record()),
        "post_instruction_positions": list(chat.positions),
        "writers": write_hooks(loaded.cfg.n_layers),
        **(_discover(loaded, chat, source) if discover else {"refusal_tokens": "not asked for"}),
    }
    if as_json:
        print_json(facts)
    else:
        facts["writers"] = explain_writes(loaded.cfg.n_layers)
        print_facts({key: value for key, value in facts.items() if value not in (None, "", {})})
    return 0


def _sets(source: str) -> "list[PromptSet]":
    from ..recipes.options import default_sets
    from ..text.prompts import load_prompts

    return [load_prompts(name.split(",")[0]) for name in default_sets(source)[:2]]


def _discover(model: "HookedModel", chat: "ChatFormat", source: str) -> dict[str, Any]:
    """What short answers to a few prompts of both sides say."""
    from ..labels import find_refusal_tokens, label_prompts
    from ..stats import Rate

    labels = [label_prompts(model, chat, prompts.instructions[:N_PROBE_PROMPTS]) for prompts in _sets(source)]
    tokens = find_refusal_tokens([label for side in labels for label in side])
    rates = [Rate.of([label.is_refused for label in side]) for side in labels]
    described = [f"{' '.join(map(str, prefix))} {chat.tokenizer.decode(list(prefix))!r}" for prefix in tokens]
    return {
        "refused_by_text": ", ".join(
            f"{side} {rate} of {rate.n}" for side, rate in zip(("harmful", "harmless"), rates, strict=True)
        ),
        "refusal_tokens": described or "none: no beginning of an answer tells refusals from other answers",
    }
