"""Tables and picture of docs/one-or-several.md, from runs that were compared: `python -m benchmarks.methods RUN`."""

import sys
from pathlib import Path

from refusal_mi.figures.methods import plot_ratios
from refusal_mi.figures.save import save_figure
from refusal_mi.files import write_text
from refusal_mi.run.methods import MethodRow, MethodsResult
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
    """Write the table of each run folder under the marker of its model's name."""
    for run in runs:
        found = MethodsResult.load(Path(run) / "methods")
        start, end = f"<!-- {found.model.name} -->\n", "<!-- end -->"
        page = PAGE.read_text(encoding="utf-8")
        before, marker, rest = page.partition(start)
        if not marker:
            raise SystemExit(f"{PAGE} has no line {start.strip()}")
        if found.model.name == "the embedded model":
            save_figure(plot_ratios(found, model=found.model.name), PAGE.with_suffix(".png"), width=900)
        write_text(PAGE, before + start + "\n" + "\n".join(table(found)) + "\n\n" + end + rest.partition(end)[2])


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


def cells(row: MethodRow) -> list[str]:
    """One method."""
    whole, matched = row.at(1.0), row.matched
    there = ["–", "–", "–", "never fewer", ""]
    if matched.strength is not None and matched.kl_nats is not None and matched.refused is not None:
        there = [f"{matched.refused:.2f}", f"{matched.strength:.2f}", f"{matched.kl_nats:.4f}"]
        there += [ratio(matched.ratio), ratio(row.over_single)]
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


def ratio(found: tuple[float | None, float | None, float | None]) -> str:
    """With its interval; nothing where there is none."""
    value, low, high = found
    limits = "[unbounded]" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
    return "" if value is None else f"{value:.2f} {limits}"


if __name__ == "__main__":
    main(sys.argv[1:])
