"""Write the table of docs/scaling.md from results.json: `python -m benchmarks.table`."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.common import GPU_RESULTS, RESULTS
from refusal_mi.files import read_json, write_text

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- table -->\n", "<!-- end of table -->"
HEADER = (
    "| what | times faster (range) | must reach | straightforward | this package | peak memory, MiB | difference |\n"
    "|---|---|---|---|---|---|---|\n"
)


def table(known: dict[str, Any]) -> str:
    """The machine in words, then Markdown."""
    machine = known["machine"]
    lines = [
        f"Measured on {machine['processor']}, {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}, "
        f"torch {machine['torch']}, Python {machine['python']}.\n\n",
        HEADER,
    ]
    for row in known["rows"].values():
        reached = "" if row["ratio"] >= row["must_reach"] else " (missed)"
        lines.append(
            f"| {row['name']} | {row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f}) | "
            f"{row['must_reach']:.2f}{reached} | {row['straightforward_seconds']:.2f} s | {row['our_seconds']:.2f} s | "
            f"{row['straightforward_peak_mib']:.0f} / {row['our_peak_mib']:.0f} | {row['largest_difference']:.1e} |\n"
        )
    notes = [f"- {row['name']}: {row['note']}\n" for row in known["rows"].values()]
    return "".join([*lines, "\n", *notes])


def costs(known: dict[str, Any]) -> str:
    """The fitted cost of each stage, Markdown."""
    lines = ["| stage | s per layer call | s per 10⁹ multiply-adds, blocks | unembedding | error: median (largest) |\n"]
    lines.append("|---|---|---|---|---|\n")
    for name, found in known.get("costs", {}).items():
        call, block, head = found["coefficients"].values()
        lines.append(
            f"| {name} | {call:.1e} | {block * 1e9:.3f} | {head * 1e9:.3f} | "
            f"{found['median_error']:.0%} ({found['largest_error']:.0%}), n = {found['n']} |\n"
        )
    return "".join(lines)


def main() -> int:
    """Write both tables into the page."""
    known, page = read_json(RESULTS), PAGE.read_text(encoding="utf-8")
    parts = [(table(known), START, END), (costs(known), "<!-- costs -->\n", "<!-- end of costs -->")]
    if GPU_RESULTS.exists():
        parts.append((table(read_json(GPU_RESULTS)), "<!-- gpu table -->\n", "<!-- end of gpu table -->"))
    for text, start, end in parts:
        before, _, rest = page.partition(start)
        page = before + start + text + end + rest.partition(end)[2]
    write_text(PAGE, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
