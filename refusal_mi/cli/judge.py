"""`refusal-mi judge`: judge saved completions again."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .arguments import AsJson
from .bundles import JudgeOptions, flat

_KEPT = ("prompt", "response", "quick")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("judge")(command)


@flat
def command(
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
    from ..judges import SubstringJudge
    from ..pipelines.effects import evaluate
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
