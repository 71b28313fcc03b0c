"""`refusal-mi combos`: which directions to ablate together, chosen on validation prompts."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .arguments import AsJson, BatchSize, OutputDir, parse_batch_size
from .bundles import JudgeOptions, ModelOptions, flat, limit

if TYPE_CHECKING:
    from ..pipelines.options import RunOptions

SCIENCE_FAILED = 1


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("combos")(command)


@flat
def command(
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

    from ..pipelines.combos import CombosOptions, run_combos
    from ..pipelines.defaults import default_folder
    from ..pipelines.drawing import draw_combos
    from ..report import identity_of, list_combinations
    from ..stages import RunFolder
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
    from ..pipelines.defaults import default_options
    from ..pipelines.options import RunOptions

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
