"""Real chat models: their names, and one small run through the command line."""

import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

from refusal_mi.cli import exit_status
from refusal_mi.directions import ActivationMeans, DirectionGrid, difference_in_means

QWEN, SMOLLM2 = "qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"
"""Refuses about half of harmful prompts; hardly ever refuses."""
OPTIONS = {
    "--n-train": 48, "--n-val": 16, "--n-test": 24, "--max-new-tokens": 24, "--n-ce": 12, "--n-random": 1,
    "--induce-min": -0.5, "--device": "cpu",
}  # fmt: skip
"""Small sizes. At these the staged search finds no candidate of the first model that passes the published thresholds:
the one nearest to them induces a refusal score 0.15 nats below the zero point. Half a nat leaves room for it."""
FEW = tuple((position, layer) for position in (-2, -1) for layer in (11, 13, 15, 17, 19))
"""Candidates of the model that refuses, around those that a search chooses."""


@dataclass(frozen=True)
class Ran:
    """A command that has run."""

    folder: Path
    status: int
    out: str


def run_search(model: Path, folder: Path, *more: str, search: str = "staged") -> Ran:
    """`refusal-mi run MODEL --search … OPTIONS`."""
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    return command("run", str(model), "--search", search, *options, *more, folder=folder)


def command(*words: str, folder: Path) -> Ran:
    """Any command that writes a folder."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = exit_status([*words, "--output-dir", str(folder)])
    return Ran(folder, status, printed.getvalue())


def few(harmful: ActivationMeans, harmless: ActivationMeans) -> DirectionGrid:
    """An estimator that gives the differences of means of these candidates alone."""
    grid = difference_in_means(harmful, harmless)
    layers = range(grid.n_layers)
    left_out = tuple(tuple((position, layer) not in FEW for layer in layers) for position in grid.positions)
    return replace(grid, is_degenerate=left_out)
