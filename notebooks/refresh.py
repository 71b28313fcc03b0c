"""Run notebooks and write them back as they are committed: `python notebooks/refresh.py [NOTEBOOK ...]`.

Without arguments, all of them. `make notebooks` only runs them; here outputs are kept too: figures and paragraphs,
without lines of progress and without the metadata of one machine.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from refusal_mi.progress import NOTEBOOK_METADATA

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> int:
    """An error in a cell ends the run and leaves that notebook as it was."""
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
        nbformat.write(cleaned(notebook), path)
    return 0


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


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return output.get("metadata", {}).items() >= NOTEBOOK_METADATA.items()


if __name__ == "__main__":
    sys.exit(main())
