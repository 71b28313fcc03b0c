"""How the results of `refusal-mi caa` look in a terminal."""

from collections.abc import Sequence
from typing import Any


def print_lines(*lines: str) -> None:
    """Lines as they are, however long."""
    from rich.console import Console

    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def print_answers(summary: dict[str, Any]) -> None:
    """Rates of every multiplier, and the first question's answers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    plain = summary["baseline"]
    rates = Table(f"n = {summary['n_questions']}", "refusal-like", "degenerate")
    rates.add_row("plain", *_two_rates(plain))
    for multiplier, found in summary["by_multiplier"].items():
        for way in ("add", "subtract"):
            rates.add_row(f"{way} x{multiplier}", *_two_rates(found[way]))
    console.print(rates)
    first = [found["first_question"] for found in summary["by_multiplier"].values()]
    console.print(first[0]["question"], markup=False, highlight=False)
    table = Table("alpha", "add steering", "subtract steering")
    for multiplier, row in zip(summary["by_multiplier"], first, strict=True):
        table.add_row(multiplier, *(_cell(row[f"answer_with_{way}_steering"]) for way in ("add", "substract")))
    console.print(table)


def print_sweep(record: dict[str, Any]) -> None:
    """p(matching) by layer and multiplier, and the layer that was chosen, or why none was."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "our", "multiplier", "p(matching) [95%]", "change [95%]")
    for row in record["rows"]:
        p = f"{row['p']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        change = f"{row['delta']:+.3f} [{row['delta_low']:+.3f}, {row['delta_high']:+.3f}]"
        table.add_row(str(row["layer"]), str(row["layer"] + 1), f"{row['multiplier']:g}", p, change)
    print_lines(
        f"{record['pairs']}, n = {record['rows'][0]['n_pairs']} pairs, plain p(matching) = {record['p_plain']:.3f}",
        record["rows"][0]["layer_means"],
    )
    Console().print(table)
    chosen = record["chosen"]
    if chosen is None:
        print_lines(f"no layer was chosen: {record['why_none']}")
        return
    print_lines(
        f"chosen on {chosen['chosen_on']}: {chosen['layer_means']}, multiplier {chosen['multiplier']:g}",
        f"on {record['pairs']}: {_changes(chosen)}; degenerate text {chosen['degenerate_added']['rate']:.2f} and "
        f"{chosen['degenerate_subtracted']['rate']:.2f}",
        *(f"{kind}: {_changes(changes)}" for kind, changes in chosen["controls"].items()),
    )


def _changes(found: dict[str, Any]) -> str:
    return f"adding changes p by {found['change_added']:+.3f}, subtracting by {found['change_subtracted']:+.3f}"


def _two_rates(found: dict[str, Any]) -> Sequence[str]:
    return [f"{found[f'{kind}_rate']['rate']:.2f}" for kind in ("refusal_like", "degenerate")]


def _cell(text: str) -> Any:
    from rich.text import Text

    return Text("".join(character if character.isprintable() else " " for character in text))
