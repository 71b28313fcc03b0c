"""`refusal-mi audit`: was a direction removed from this checkpoint, which, where, how strongly?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AllowOtherModel, AsJson, DirectionSource, OutputDir, Ranks, Revision

if TYPE_CHECKING:
    from ..audit import AuditResult
    from ..directions import Direction

RECORD, DIRECTIONS = "audit.json", "directions.pt"


def audit(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="Local directory or hub id; alone it is SUSPECT, of the embedded model."),
    ],
    suspect: Annotated[
        str | None, typer.Argument(metavar="SUSPECT", help="The same, or a folder with a LoRA adapter of BASE.")
    ] = None,
    revision: Revision = None,
    suspect_revision: Annotated[str | None, typer.Option(help="Of SUSPECT: hub branch, tag or commit.")] = None,
    direction: DirectionSource = None,
    directions: Ranks = None,
    allow_other_model: AllowOtherModel = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Say whether a direction was removed from a checkpoint.

    Every tensor of SUSPECT is compared with that of BASE, which it was made from; nothing is run. With --direction, the
    removed directions are compared with those of a file or a run of BASE.
    """
    from ..audit import audit as compare
    from ..errors import UserError
    from ..files import at_home
    from ..model.loading import resolve_source
    from .export import quiet
    from .tables import print_audit, print_json

    if suspect is None and revision is not None:
        raise UserError("--revision is that of BASE, which is the embedded model here: say --suspect-revision")
    if output_dir is not None:
        _check_folder(at_home(output_dir))
    first, second = (None, base) if suspect is None else (base, suspect)
    quiet()
    given = _directions(resolve_source(first), revision, direction, directions, allow_other_model)
    found = compare(first, second, given, base_revision=revision, suspect_revision=suspect_revision)
    if output_dir is not None:
        _write(found, output_dir)
    print_json(found) if as_json else print_audit(found, output_dir)
    return 0


def _directions(
    source: str, revision: str | None, place: Path | None, ranks: str | None, is_other_allowed: bool
) -> "list[Direction] | None":
    from ..directions import Direction
    from ..errors import UserError
    from ..files import at_home
    from ..model.guards import read_config
    from ..model.provenance import check_origin
    from ..run.directions import read_directions

    if place is None:
        if ranks is not None:
            raise UserError("--directions ranks the candidates of a run folder: name it with --direction")
        return None
    place = at_home(place)
    if not place.exists():
        raise UserError(f"no such direction: {place}; give --direction FILE or RUN_DIR, or leave it out")
    found = read_directions(place, read_config(source, revision).get_text_config().num_hidden_layers, ranks)
    named = [each.provenance for each in found if isinstance(each, Direction)]
    check_origin(named, source, revision, allowed=is_other_allowed)
    return found  # type: ignore[return-value]


def _check_folder(folder: Path) -> None:
    """Before the work, not after it."""
    from ..errors import UserError

    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {folder} cannot be written: {there} is no folder, or one that is read-only")


def _write(found: "AuditResult", folder: Path) -> None:
    from ..figures.audit import plot_audit
    from ..figures.save import save_figures
    from ..files import at_home, write_record, write_tensors

    folder = at_home(folder)
    write_record(folder / RECORD, found)
    if len(found.directions):
        write_tensors(folder / DIRECTIONS, found.directions)
    save_figures({"audit": plot_audit(found)}, folder)
