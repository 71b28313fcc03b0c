"""Real chat models: their names, and one small run through the command line."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from refusal_mi.cli import exit_status

QWEN, SMOLLM2 = "qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"
"""Refuses about half of harmful prompts; hardly ever refuses."""
SIZES = {"--n-train": 48, "--n-val": 16, "--n-test": 24, "--max-new-tokens": 24, "--n-ce": 12, "--n-random": 1}


@dataclass(frozen=True)
class Ran:
    """A command that has run."""

    folder: Path
    status: int
    out: str


def run_search(model: Path, folder: Path, *more: str) -> Ran:
    """`refusal-mi run MODEL --search staged` at small sizes."""
    sizes = [str(word) for size in SIZES.items() for word in size]
    return command("run", str(model), "--search", "staged", *sizes, "--device", "cpu", *more, folder=folder)


def command(*words: str, folder: Path) -> Ran:
    """Any command that writes a folder."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = exit_status([*words, "--output-dir", str(folder)])
    return Ran(folder, status, printed.getvalue())
