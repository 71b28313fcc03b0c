"""Run notebooks and write them back as they are committed: `python notebooks/refresh.py [NOTEBOOK ...]`.

Without arguments, all of them. Outputs are kept: figures and paragraphs, without lines of progress and without the
metadata of one machine. `--check` (`make notebooks`) leaves the committed ones as they are, writes what came out to
build/notebooks, and fails where it says something else than what is committed. A notebook on a real model is left
out where that model is not there: REFUSAL_MI_REAL_MODELS names the folder that holds it.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from refusal_mi.progress import NOTEBOOK_METADATA

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build" / "notebooks"
REAL_MODELS = "REFUSAL_MI_REAL_MODELS"
"""The environment variable with the folder of real models; a relative one starts at the notebooks."""
NEEDS = {"08-a-real-model.ipynb": "qwen2.5-coder-0.5b-instruct"}
"""Notebook -> the real model that it runs on; all others run on the embedded one."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PLOTLY, MARKDOWN = "application/vnd.plotly.v1+json", "text/markdown"
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ROUNDING = 1e-4
"""Smaller numbers are rounding errors and what hangs on them: all the same."""
ALLOWED = 0.02
"""How far numbers may lie apart, relative to the larger one in a text, to the largest of its kind in a figure."""


def main() -> int:
    """An error in a cell ends the run and leaves that notebook as it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--check", action="store_true", help="compare with what is committed and change nothing")
    arguments = parser.parse_args()
    n_stale = 0
    for path in arguments.notebooks:
        if model := missing_model(path):
            sys.stdout.write(f"{path.name}: left out, there is no {model} in the folder that {REAL_MODELS} names\n")
            continue
        committed, notebook = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
        execute(notebook)
        if not arguments.check:
            nbformat.write(cleaned(notebook), path)
            continue
        BUILD.mkdir(parents=True, exist_ok=True)
        nbformat.write(cleaned(notebook), BUILD / path.name)
        stale = differences(notebook, committed)
        n_stale += len(stale)
        lines = [f"{path.name}: {'not what is committed' if stale else 'as committed'}", *stale]
        sys.stdout.write("\n  ".join(lines) + "\n")
    return 1 if n_stale else 0


def missing_model(path: Path) -> str | None:
    """The real model that a notebook needs, where it is not there."""
    model, folder = NEEDS.get(path.name), os.environ.get(REAL_MODELS)
    is_there = model is None or (folder is not None and (FOLDER / folder / model / "config.json").is_file())
    return None if is_there else model


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run every cell, in the folder of the notebooks."""
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what a reader sees, and nothing else."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None)
    return notebook


def differences(found: nbformat.NotebookNode, committed: nbformat.NotebookNode) -> list[str]:
    """Outputs that say something else: other words, other numbers, other traces. One line each."""
    lines = []
    for number, (cell, other) in enumerate(zip(found.cells, committed.cells, strict=True)):
        shown, expected = (list(_shown(each)) for each in (cell, other))
        if len(shown) != len(expected):
            lines.append(f"cell {number}: {len(shown)} outputs, {len(expected)} are committed")
            continue
        for (kind, a), (other_kind, b) in zip(shown, expected, strict=True):
            if kind != other_kind:
                lines.append(f"cell {number}: {kind}, where {other_kind} is committed")
            elif kind == PLOTLY:
                lines += [f"cell {number}: {line}" for line in _differing_figure(go.Figure(a), go.Figure(b))]
            elif not _same_text(a, b):
                lines.append(f"cell {number}: {_first_other_line(a, b)}")
    return lines


def _shown(cell: nbformat.NotebookNode) -> Iterator[tuple[str, Any]]:
    """Figures and paragraphs; static pictures need a browser, and warnings are no result."""
    for output in cell.get("outputs", []):
        if not _is_progress(output):
            yield from ((kind, output.data[kind]) for kind in (PLOTLY, MARKDOWN) if kind in output.get("data", {}))


def _same_text(found: str, expected: str) -> bool:
    pairs = [_without_seconds(text) for text in (found, expected)]
    words = [NUMBER.sub("#", text) for text in pairs]
    numbers = [[float(each.replace("−", "-")) for each in NUMBER.findall(text)] for text in pairs]
    return words[0] == words[1] and all(map(_is_close, *numbers))


def _is_close(found: float, expected: float) -> bool:
    largest = max(abs(found), abs(expected))
    return largest < ROUNDING or abs(found - expected) <= ALLOWED * largest


def _without_seconds(text: str) -> str:
    return re.sub(r"\d+(\.\d+)? s\b", "# s", text)


def _first_other_line(found: str, expected: str) -> str:
    both = zip(found.splitlines(), expected.splitlines(), strict=False)
    a, b = next(((a, b) for a, b in both if not _same_text(a, b)), (found, expected))
    return f"{a!r}, where {b!r} is committed"


def _differing_figure(found: go.Figure, expected: go.Figure) -> list[str]:
    titles = [figure.layout.title.text for figure in (found, expected)]
    if titles[0] != titles[1]:
        return [f"the figure {titles[0]!r}, where {titles[1]!r} is committed"]
    traces = [[(trace.type, trace.name) for trace in figure.data] for figure in (found, expected)]
    if traces[0] != traces[1]:
        return [f"other traces in {titles[0]!r}"]
    pairs = zip(found.data, expected.data, strict=True)
    return [
        f"other values of {key} in the trace {a.name!r} of {titles[0]!r}"
        for a, b in pairs
        for key in ("x", "y", "z")
        if not _same_values(getattr(a, key, None), getattr(b, key, None))
    ]


def _same_values(found: Any, expected: Any) -> bool:
    pair = [list(_flat(values)) for values in (found, expected)]
    limit = max(ROUNDING, ALLOWED * max((abs(value) for value in pair[1] if isinstance(value, float)), default=0.0))
    return len(pair[0]) == len(pair[1]) and all(
        abs(a - b) <= limit if isinstance(a, float) and isinstance(b, float) else a == b
        for a, b in zip(*pair, strict=True)
    )


def _flat(values: Any) -> Iterator[float | str | None]:
    if isinstance(values, str) or values is None:
        yield values
    elif hasattr(values, "__len__"):
        for each in values:
            yield from _flat(each)
    else:
        yield float(values) if values == values else None


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return output.get("metadata", {}).items() >= NOTEBOOK_METADATA.items()


if __name__ == "__main__":
    sys.exit(main())
