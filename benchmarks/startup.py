"""Start-up: `import typer, rich` against `import refusal_mi` and `refusal-mi --help`, each a process of its own."""

import subprocess
import sys

from benchmarks.common import compare, report

BARE = ("-c", "import typer, rich")
OURS = {"import refusal_mi": ("-c", "import refusal_mi"), "refusal-mi --help": ("-m", "refusal_mi", "--help")}


def start(arguments: tuple[str, ...]) -> None:
    """One process, waited for."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def imports_torch(arguments: tuple[str, ...]) -> bool:
    """Whether the same start loads torch."""
    options = [sys.executable, "-X", "importtime", *arguments]
    return "| torch\n" in subprocess.run(options, check=True, capture_output=True, text=True).stderr.replace("  ", "")


def main() -> None:
    """Run two rows."""
    for name, options in OURS.items():
        row = compare(
            f"start-up, {name}",
            lambda: start(BARE),
            lambda: start(options),
            lambda *_: float(imports_torch(options)),
            must_reach=1 / 3,
            n_pairs=7,
            largest_allowed=0,
            note="against import typer, rich; difference 1: torch is imported",
        )
        report(row)


if __name__ == "__main__":
    main()
