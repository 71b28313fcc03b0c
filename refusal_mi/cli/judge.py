"""`refusal-mi judge`: what judges say of saved answers, and how far they agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import AsJson, JudgeOptions, Output, OutputDir, flat

if TYPE_CHECKING:
    from ..judges.agreement import Agreement
    from ..judges.protocol import Judge
    from ..run.answers import Evaluation

COMPLETIONS, AGREEMENT = "_completions.json", "agreement.json"


@flat
def judge(
    *,
    completions: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR|COMPLETIONS.json", help="A run folder, or a list of objects with prompt and response."
        ),
    ],
    judge: JudgeOptions,
    judges: Annotated[
        str | None,
        typer.Option(help="Several, as --judge takes them: their agreement (Cohen's kappa).", metavar="NAME,NAME,..."),
    ] = None,
    output: Output = None,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Judge saved completions again.

    Counted are refusals, degenerate text, and what another judge says of the completions. Verdicts on a run folder go
    to RUN_DIR/judged, those on a file beside it.
    """
    from ..files import write_json, write_record
    from ..judges.substring import caution
    from .tables import Console, print_facts, print_json, print_lines, print_rates

    asked = _asked(judge, judges)
    if completions.is_dir():
        if output is not None:
            raise UserError(
                "--output is for one file of completions; of a run folder, name the folder with --output-dir"
            )
        files = sorted((completions / "completions").glob(f"*{COMPLETIONS}"))
        if not files:
            raise UserError(f"{completions} has no completions: run its step completions first")
        folder = output_dir or completions / "judged"
        judged = {file.name.removesuffix(COMPLETIONS): _judge(file, asked) for file in files}
        for name, each in judged.items():
            write_json(folder / f"{name}_evaluations.json", each)
        compared = None if judges is None else _compare(judged, asked)
        if compared is not None:
            write_record(folder / AGREEMENT, compared)
        if as_json:
            print_json(judged if compared is None else {"evaluations": judged, "agreement": compared})
            return 0
        print_rates(Console(), "completions", {name: each.effect(name) for name, each in judged.items()})
        if compared is not None:
            _print_agreement(compared)
        print_lines(f"written: {folder}")
        return 0
    stem = completions.stem.removesuffix("_completions")
    target = output or (output_dir or completions.parent) / f"{stem}_evaluations.json"
    if target.resolve() == completions.resolve():
        raise UserError(f"the verdicts would overwrite {completions}; name another file with --output")
    found = _judge(completions, asked)
    compared = None if judges is None else _compare({stem: found}, asked)
    write_json(target, found)
    if compared is not None:
        write_record(target.with_name(f"{target.stem.removesuffix('_evaluations')}_{AGREEMENT}"), compared)
    if as_json:
        print_json(found if compared is None else {"evaluations": {stem: found}, "agreement": compared})
        return 0
    rates = {f"{name}_success_rate": found.rate(name).value for name in found.judges}
    refusal, broken, n = found.refusal.value, found.degenerate.value, len(found.answers)
    print_facts({**rates, "refusal_rate": refusal, "degenerate_rate": broken, "n": n, "written": str(target)})
    if len(asked) > 1 or found.classes(asked[0].name):
        print_rates(Console(), stem, {stem: found.effect(stem)})
    if compared is not None:
        _print_agreement(compared)
    if note := caution([row.prompt for row in found.answers], [row.response for row in found.answers]):
        print_lines(f"caution: {note}")
    return 0


def _asked(judge: JudgeOptions, judges: str | None) -> "list[Judge]":
    """Who is to judge."""
    from ..judges.named import judges_named

    if judges is None:
        return [judge.build("harm")]
    if judge.judge is not None:
        raise UserError("--judge names one judge and --judges several: leave one of the two out")
    return judges_named(judges, model=judge.judge_model, labels=judge.judge_labels)


def _judge(file: Path, asked: "Sequence[Judge]") -> "Evaluation":
    """The verdicts on a file of completions; those of the phrases are always among them."""
    from ..files import read_json
    from ..judges.substring import SubstringJudge
    from ..recipes.effects import evaluate
    from ..run.answers import Completion

    rows = read_json(file)
    rows = rows.get("completions") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows or not all(map(_is_completion, rows)):
        raise UserError(f"{file} must hold a list of objects with the texts prompt and response")
    others = [each for each in asked if not isinstance(each, SubstringJudge)]
    answers = [Completion(row.get("category"), row["prompt"], row["response"]) for row in rows]
    return evaluate(answers, SubstringJudge(), *others, quick=any(row.get("quick") for row in rows))


def _compare(judged: "Mapping[str, Evaluation]", asked: "Sequence[Judge]") -> "Agreement":
    """Of all answers of all sets."""
    from ..judges.agreement import agreement

    answers = [answer for each in judged.values() for answer in each.answers]
    said = {each.name: [answer.verdict(each.name) for answer in answers] for each in asked}
    return agreement(said, [answer.prompt for answer in answers], [answer.response for answer in answers])


def _print_agreement(found: "Agreement") -> None:
    """κ of every pair of judges, what they say of the same answers, and how some begin of which they differ."""
    from .tables import Console, Table, one_line, print_lines

    console = Console()
    title = f"agreement, n = {found.n_answers} answers to {found.n_prompts} prompts"
    table = Table(title, "agree", "κ, complied [95%]", "κ, three classes [95%]")
    for pair in found.pairs:
        classes = "" if pair.classes is None else str(pair.classes)
        table.add_row(f"{pair.first}, {pair.second}", f"{pair.complied.agreed:.2f}", str(pair.complied), classes)
    console.print(table)
    for name, n in found.unread.items():
        if n:
            print_lines(f"unread: {n} of {found.n_answers} verdicts of {name}; its pairs are of the others")
    for pair in found.pairs:
        differing = [(a, b, n) for a, row in pair.counts.items() for b, n in row.items() if a != b]
        if not differing:
            continue
        table = Table(pair.first, pair.second, "answers", "such as")
        for a, b, n in differing:
            such = next((each.begins for each in pair.differences if (each.first, each.second) == (a, b)), "")
            table.add_row(a, b, str(n), one_line(such))
        console.print(table)


def _is_completion(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "response"))
