"""Tables and picture of docs/one-or-several.md, from runs that were compared: `python -m benchmarks.methods RUN`.

The second table is of `RUN/draws`, if methods were compared there too, over draws of the training prompts.
"""

import sys
from pathlib import Path

from refusal_mi.cli.methods_tables import change_text, limits, ratio_text, singles
from refusal_mi.figures.methods import plot_ratios
from refusal_mi.figures.save import save_figure
from refusal_mi.files import write_text
from refusal_mi.run.methods import DrawsRow, MethodRow, MethodsResult
from refusal_mi.stats import signed

PAGE = Path(__file__).parent.parent / "docs" / "one-or-several.md"
HEADERS = (
    "method",
    "layer",
    "refused at 1",
    "KL at 1",
    "matched at",
    "strength",
    "KL there",
    "ratio",
    "to k = 1",
    "refused there",
    "CE",
)


def main(runs: list[str]) -> None:
    """Write the tables of each run folder under the markers of its model's name."""
    for run in runs:
        found, other = MethodsResult.load(Path(run) / "methods"), Path(run) / "draws"
        if found.model.name == "the embedded model":
            save_figure(plot_ratios(found, model=found.model.name), PAGE.with_suffix(".png"), width=900)
        write_under(found.model.name, table(found))
        beside = MethodsResult.load(other) if other.is_dir() else found
        if beside.beside:
            write_under(f"beside, {found.model.name}", beside_table(beside))


def write_under(name: str, lines: list[str]) -> None:
    """Between a marker of the page and the end of its table."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, marker, rest = PAGE.read_text(encoding="utf-8").partition(start)
    if not marker:
        raise SystemExit(f"{PAGE} has no line {start.strip()}")
    write_text(PAGE, before + start + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2])


def table(found: MethodsResult) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found.rows]
    for name in dict.fromkeys(each.label for each in found.controls):
        of_kind = [each for each in found.controls if each.label == name]
        shares, kl = [each.refused_by_score for each in of_kind], [each.kl_nats for each in of_kind]
        ranks = sorted({each.k for each in of_kind})
        what = f"{len(of_kind)} controls, {name}, of {ranks[0]} to {ranks[-1]}"
        spans = f"{min(shares):.2f} to {max(shares):.2f} (score)", f"{min(kl):.4f} to {max(kl):.4f}"
        lines.append("| " + " | ".join([what, "", *spans, "", "", "", "", "", "", ""]) + " |")
    return lines


def beside_table(found: MethodsResult) -> list[str]:
    """Markdown: what else every method changes, over draws and where nothing harmful is asked."""
    plain = found.beside[0]
    names = [each.set_name for each in plain.over_refusal] + [each.task for each in plain.capability]
    to_single = {row.label: row for row in found.draws if row.over != found.rows[0].label}
    to_first = {row.label: row for row in found.draws if row.over == found.rows[0].label}
    n_draws = len(found.draws[0].ratios) if found.draws else 1
    over = [
        "ratio, one fit",
        f"{n_draws} draws",
        "SD; SE of log",
        "to k = 1, one fit",
        f"{n_draws} draws",
        "SD; SE of log",
    ]
    over = over if found.draws else []
    headers = ["method", *over, "dependence", *(cell for name in names for cell in (f"`{name}`", "change"))]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for index, row in enumerate(found.beside):
        cells = [f"`{row.label}`" if index else "plain"]
        if over:
            cells += [*of_draws(to_first.get(row.label)), *of_draws(to_single.get(row.label))]
        dependent = found.dependent(row.label)
        cells.append("" if dependent is None else f"{dependent:.3f}")
        for each in row.over_refusal:
            cells += [f"{each.refused.value:.2f}", change_text(limits(each.change)) if index else ""]
        for task in row.capability:
            cells += [f"{task.after[0]:.3f}", change_text(task.change) if index else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def of_draws(row: DrawsRow | None) -> list[str]:
    """The ratio of one fit, every single one, and on the log scale what its interval is made of."""
    if row is None:
        return [""] * 3
    parts = ["–" if each is None else f"{each:.2f}" for each in (row.sd_draws, row.se_prompts)]
    return [ratio_text(row.one_fit), singles(row.ratios), "; ".join(parts)]


def cells(row: MethodRow) -> list[str]:
    """One method."""
    whole, matched = row.at(1.0), row.matched
    there = ["–", "–", "–", "never fewer", ""]
    if matched.strength is not None and matched.kl_nats is not None and matched.refused is not None:
        there = [f"{matched.refused:.2f}", f"{matched.strength:.2f}", f"{matched.kl_nats:.4f}"]
        there += [ratio_text(matched.ratio), ratio_text(row.over_single)]
    name = f"`{row.label}`"
    kl = f"{whole.kl_nats[0]:.4f}"
    return [
        name,
        str(row.layer),
        f"{whole.refused.value:.2f}",
        kl,
        *there,
        str(row.refused_by_text),
        signed(row.ce_change, 3),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
