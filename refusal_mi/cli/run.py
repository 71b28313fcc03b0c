"""`refusal-mi run`, `combos`, `select`, `judge`, `model-info`: from a model to its refusal direction, with evidence."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import (
    AsJson,
    BatchSize,
    JudgeOptions,
    ModelOptions,
    OutputDir,
    TemplateOptions,
    ThresholdOptions,
    flat,
    limit,
    parse_batch_size,
    parse_tokens,
)

if TYPE_CHECKING:
    from ..model.points import HookedModel
    from ..recipes.options import RunOptions
    from ..text.chat import ChatFormat
    from ..text.prompts import PromptSet

SCIENCE_FAILED = 1


@flat
def run(
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
    from ..recipes.arditi import run
    from ..recipes.combinations import check_multi
    from ..recipes.options import RunOptions, default_folder, default_options
    from ..report.page import identity_of, list_combinations, write_report
    from ..run.record import parse_directions
    from ..run.stages import RunFolder
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


@flat
def combos(
    *,
    model: ModelOptions,
    ranks: Annotated[
        str | None, typer.Option(help="0..4, or 0,2,5: ranks of surviving candidates; default: the five best.")
    ] = None,
    max_size: Annotated[int, typer.Option(help="Most directions in a combination.")] = 2,
    kl_max: Annotated[float, typer.Option(help="Largest KL of a winner on harmless prompts, in nats; inf: any.")] = 0.1,
    n_random: Annotated[int, typer.Option(help="Random spans of the winner's rank, as controls.")] = 3,
    n_ce: Annotated[int, typer.Option(help="At most this many texts of each CE set.")] = 256,
    val_new_tokens: Annotated[int, typer.Option(help="Length of the validation answers.")] = 32,
    judge: JudgeOptions,
    quick: Annotated[bool, typer.Option("--quick", help="On the quick run of this model.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")] = False,
    batch_size: BatchSize = "auto",
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Choose which directions to ablate together, and test them.

    Every single direction and combination is ablated on validation prompts, the winner on held-out ones.

    Prompts, search and options are those of the run in the run folder; without one, of a run with the defaults.
    """
    from dataclasses import replace

    from ..figures.effects import draw_combos
    from ..recipes.combinations import CombosOptions, run_combos
    from ..recipes.options import default_folder
    from ..report.page import identity_of, list_combinations
    from ..run.stages import RunFolder
    from .tables import print_json

    combos = CombosOptions(parse_ranks(ranks), max_size, limit(kl_max), n_random, n_ce, val_new_tokens)
    path = output_dir or default_folder(model.source, quick=quick)
    options = replace(_run_options(path, model.source, quick), batch_size=parse_batch_size(batch_size))
    if judge.judge is not None:
        options = replace(options, judge=judge.name, judge_model=judge.judge_model)
    elif judge.judge_model is not None:
        options = replace(options, judge_model=judge.judge_model)
    folder = RunFolder(path, fresh, lambda message: print(message, file=sys.stderr))
    folder.check_writable()
    before = identity_of(path)
    found = run_combos(model.load(), model.source, options, folder, combos)
    if "baseline" in found:
        draw_combos(found, path)
        list_combinations(path, before)
    if as_json:
        print_json(found)
    else:
        _print(found, path)
    return 0 if found["status"] == "done" else SCIENCE_FAILED


def parse_ranks(text: str | None) -> tuple[int, ...] | None:
    """0..4 is 0, 1, 2, 3, 4; ranges and single ranks may be joined by commas.

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--ranks takes 0..4, or ranks such as 0,2,5, not {text!r}")
        found += range(first, last + 1)
    return tuple(found)


def _run_options(path: Path, source: str, quick: bool) -> "RunOptions":
    from ..files import read_json
    from ..recipes.options import RunOptions, default_options

    record = path / "run.json"
    if record.exists():
        return RunOptions.from_record(read_json(record)["options"])
    options = default_options(source)
    return options.shortened() if quick else options


def _print(found: Mapping[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "baseline" not in found:
        console.print(f"{found['status']}: {found['explanation']}", highlight=False)
        return
    table = Table("ranks", "position, layer", "bypass", "KL", "refused", "degenerate", "CE loss")
    for row in [found["baseline"], *found["combinations"], *found.get("random", [])]:
        places = " + ".join(f"{place['pos']}, {place['layer']}" for place in row.get("directions", []))
        numbers = [f"{row['bypass']:.2f}", f"{row['kl_nats']:.4f}"]
        shown = [f"{row[key]['rate']:.2f}" for key in ("refusal", "degenerate")]
        _, _, seed = row["label"].partition("_random_")
        label = f"random {seed}" if seed else row["label"] + (" *" if row["label"] == found.get("winner") else "")
        table.add_row(label, places, *numbers, *shown, f"{row['ce_loss'][found['text_set']]['ce_loss']:.4f}")
    n = found["n_validation"]
    console.print(
        f"validation: {n['harmful']} harmful, {n['harmless']} harmless prompts; * the winner", highlight=False
    )
    console.print(table)
    for row in found["skipped"]:
        console.print(f"left out: {row['reason']}", highlight=False, markup=False)
    if found["status"] != "done":
        console.print(found["status"], highlight=False)
    else:
        _print_test(console, found)
    console.print(f"combos.json and combos.html: {path}", highlight=False, soft_wrap=True)


def _print_test(console: Any, found: Mapping[str, Any]) -> None:
    from .tables import rates_table

    test = found["test"]
    named = {"plain model": test["baseline"], f"winner, {found['winner']}": test["winner"]}
    if "single_best" in test:
        named[f"best single, {found['single_best']}"] = test["single_best"]
    named |= {f"random span {seed}": rates for seed, rates in enumerate(test["random"])}
    console.print(rates_table(f"held-out {test['set']}, n = {test['n']}", named))
    if "winner_minus_single" in test:
        gap = test["winner_minus_single"]
        shown = f"{gap['refusal_rate']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        console.print(f"winner minus best single, refusal rate: {shown}", highlight=False, markup=False)


@flat
def select_saved(
    *,
    grid: Annotated[Path, typer.Argument(metavar="GRID.json", help="A direction_evaluations.json.")],
    n_layers: Annotated[int, typer.Option(help="Number of blocks of the model that was scored.")],
    thresholds: ThresholdOptions,
    top: Annotated[int, typer.Option(help="Survivors to show.")] = 10,
    as_json: AsJson = False,
) -> int:
    """Select a direction from saved scores, ours or published."""
    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}")
    from ..search.grid import ScoreGrid, select
    from .tables import print_json, print_survivors

    chosen = select(ScoreGrid.load(grid, n_layers), thresholds.rule)
    if as_json:
        survivors = [row.describe() for row in chosen.survivors]
        print_json({"explanation": chosen.explain(), "survivors": survivors})
    else:
        print_survivors(chosen, top)
    return 0 if chosen.survivors else 1


_KEPT = ("prompt", "response", "quick")


@flat
def judge(
    *,
    completions: Annotated[
        Path, typer.Argument(metavar="COMPLETIONS.json", help="A list of objects with prompt and response.")
    ],
    judge: JudgeOptions,
    output: Annotated[
        Path | None, typer.Option(help="Default: beside the completions, as ..._evaluations.json.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Judge saved completions again.

    Counted are refusals, degenerate text, and what an endpoint says of the completions.
    """
    from ..files import read_json, write_json
    from ..judges.substring import SubstringJudge
    from ..recipes.effects import evaluate
    from .tables import print_facts, print_json

    rows = read_json(completions)
    rows = rows.get("completions") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows or not all(map(_is_completion, rows)):
        raise UserError(f"{completions} must hold a list of objects with the texts prompt and response")
    target = output or completions.with_name(f"{completions.stem.removesuffix('_completions')}_evaluations.json")
    if target.resolve() == completions.resolve():
        raise UserError(f"the verdicts would overwrite {completions}; name another file with --output")
    named = judge.found("harm")
    others = [] if isinstance(named, SubstringJudge) else [named]
    kept = [{"category": row.get("category")} | {key: row[key] for key in _KEPT if key in row} for row in rows]
    mark = {"quick": True} if any(row.get("quick") for row in rows) else {}
    found = evaluate(kept, SubstringJudge(), *others) | mark
    write_json(target, found)
    if as_json:
        print_json(found)
        return 0
    rates = {key: value for key, value in found.items() if key.endswith("success_rate")}
    refusal, broken = found["refusal_rate"]["rate"], found["degenerate_rate"]["rate"]
    print_facts({**rates, "refusal_rate": refusal, "degenerate_rate": broken, "n": len(rows), "written": str(target)})
    return 0


def _is_completion(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "response"))


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
    from ..model.points import parameters_of, write_hooks
    from ..model.provenance import describe_model
    from ..recipes.context import N_PREFIX_PROMPTS
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
        "refusal_tokens": _discover(loaded, chat, source) if discover else "not asked for",
    }
    print_json(facts) if as_json else print_facts(facts)
    return 0


def _sets(source: str) -> "list[PromptSet]":
    from ..recipes.options import default_sets
    from ..text.prompts import load_prompts

    return [load_prompts(name.split(",")[0]) for name in default_sets(source)[:2]]


def _discover(model: "HookedModel", chat: "ChatFormat", source: str) -> list[str] | str:
    from ..errors import UserError
    from ..measures import discover_refusal_tokens, next_token_logits

    logits = [next_token_logits(model, chat, prompts.instructions[:N_PROBE_PROMPTS]) for prompts in _sets(source)]
    try:
        tokens = discover_refusal_tokens(*logits)
    except UserError as error:
        return str(error)
    return [f"{token} {chat.tokenizer.decode([token])!r}" for token in tokens]
