"""The combinations of directions that lie in a run folder, for the page of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from .folder import SPAN, RunRecord

COMBOS_PAGE = "combos.html"


@dataclass(frozen=True)
class CombinationLink:
    """What was ablated together, and where its report lies."""

    name: str
    report: str | None
    """Relative to the run folder; None where none was written."""


def combinations_of(record: RunRecord) -> list[CombinationLink]:
    """The combinations of a whole run's present survivors, by label; those of an earlier choice are left out."""
    if record.label or record.selection is None:
        return []
    found = []
    for span in sorted(record.path.glob(f"*/{SPAN}")):
        combination = RunRecord.load(span.parent).combination
        if combination is not None and _is_of_this_choice(record, combination):
            has_report = (span.parent / "report.html").is_file()
            found.append(CombinationLink(_name(combination), f"{span.parent.name}/report.html" if has_report else None))
    return found


def combos_page(record: RunRecord) -> str | None:
    """The figure that `combos` draws of all of them, if it is there."""
    return COMBOS_PAGE if (record.path / COMBOS_PAGE).is_file() else None


def identity_of(folder: Path) -> Mapping[str, Any] | None:
    """The model and the options in a folder's `run.json`; None where there is none."""
    path = folder / "run.json"
    return {key: read_json(path).get(key) for key in ("model", "options")} if path.is_file() else None


def _is_of_this_choice(record: RunRecord, combination: Mapping[str, Any]) -> bool:
    assert record.selection is not None
    places = [{"pos": row.position, "layer": row.layer} for row in record.selection.survivors]
    named = [places[rank] if rank < len(places) else None for rank in combination["ranks"]]
    return named == list(combination["places"])


def _name(combination: Mapping[str, Any]) -> str:
    *others, last = map(str, combination["ranks"])
    ranks = f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
    return ranks if combination["multi"] == "span" else f"{ranks}, one after the other"
