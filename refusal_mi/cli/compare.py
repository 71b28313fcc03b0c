"""`refusal-mi compare`: cosines of vectors from anywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .arguments import AsJson

if TYPE_CHECKING:
    from ..vectors import Comparison, LabelledVectors

MAX_COLUMNS = 12


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(command)


def command(
    files: Annotated[
        list[Path], typer.Argument(metavar="A.pt B.pt ...", help="[d], [1, d] or [n, d]; any float type.")
    ],
    normalize_across: Annotated[
        bool, typer.Option("--normalize-across", help="Give the files one norm per row, as CAA does for behaviors.")
    ] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Where --normalize-across writes the vectors.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show the cosine similarity of every two vectors."""
    from ..files import write_tensors
    from ..vectors import compare, read_vectors
    from ..vectors import normalize_across as shared_norm
    from .tables import print_json

    if normalize_across and output_dir is None:
        raise UserError("--normalize-across writes vectors: say where with --output-dir")
    if output_dir is not None and not normalize_across:
        raise UserError("--output-dir is for --normalize-across; cosines go to the terminal (--json for a file)")
    stacks = [read_vectors(file) for file in files]
    if normalize_across and output_dir is not None:
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise UserError(f"--normalize-across needs files of different names, not {', '.join(names)}")
        stacks = shared_norm(stacks)
        for name, stack in zip(names, stacks, strict=True):
            rows = stack.rows.float()
            write_tensors(output_dir / name, rows[0] if len(rows) == 1 else rows)
    found = compare(stacks)
    print_json(found.describe()) if as_json else _print(found, stacks)
    return 0


def _print(found: "Comparison", stacks: "list[LabelledVectors]") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(found.labels) <= MAX_COLUMNS:
        table = Table("cosine", *found.labels, "norm")
        for label, row, norm in zip(found.labels, found.cosines.tolist(), found.norms.tolist(), strict=True):
            table.add_row(label, *(_number(value) for value in row), f"{norm:.4g}")
    else:
        table = Table("row", *(f"{stack.name} with {stacks[0].name}" for stack in stacks[1:]))
        starts = [sum(len(stack.rows) for stack in stacks[:index]) for index in range(len(stacks))]
        for row in range(max(len(stack.rows) for stack in stacks)):
            places = [start + min(row, len(stack.rows) - 1) for start, stack in zip(starts, stacks, strict=True)]
            table.add_row(str(row), *(_number(found.cosines[places[0], place].item()) for place in places[1:]))
        console.print(f"{len(found.labels)} vectors, row by row; the whole matrix: --json", highlight=False)
    console.print(table)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"
