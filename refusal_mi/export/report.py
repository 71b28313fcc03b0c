"""What an export reports: the record beside the weights, and the mark of one that misses its limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import write_json, write_text
from ..provenance import versions
from ..weights import EditFigures
from .rewrite import ExportDtype, ShardHashes
from .verify import Verification

RECORD, UNVERIFIED = "refusal_mi.json", "UNVERIFIED"


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how well it matches the hooks."""

    path: Path
    kind: Literal["checkpoint", "adapter"]
    source: str
    revision: str | None
    interventions: Sequence[Mapping[str, Any]]
    figures: Mapping[str, EditFigures]
    """Edited tensor -> the fraction removed, and what is left."""
    hashes: Mapping[str, ShardHashes]
    dtype: ExportDtype
    is_untied: bool
    keeps_tie: bool
    """The tied embedding was left alone, in the hooks it is compared with too."""
    head_bytes: int
    """What the untied head adds."""
    left_behind: Sequence[str]
    """Files that were not copied: the unedited weights in other formats."""
    notes: Sequence[str]
    seconds: float
    verification: Verification | None = None
    """None if none was asked for."""

    @property
    def is_verified(self) -> bool | None:
        """Whether all limits are kept; None without verification."""
        return None if self.verification is None else self.verification.passed

    def describe(self) -> dict[str, Any]:
        """`refusal_mi.json`."""
        record = {
            "kind": self.kind,
            "source": self.source,
            "revision": self.revision,
            "interventions": list(self.interventions),
            "edited_tensors": {name: asdict(figure) for name, figure in self.figures.items()},
            "sha256": {shard: asdict(both) for shard, both in self.hashes.items()},
            "dtype": self.dtype,
            "untied_head_bytes": self.head_bytes if self.is_untied else None,
            "kept_tie": self.keeps_tie,
            "left_behind": list(self.left_behind),
            "notes": list(self.notes),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
            "verification": None if self.verification is None else self.verification.describe(),
        }
        return _finite(record)


def write_record(report: ExportReport, directory: Path) -> None:
    """Write the record, and the mark of an export that misses its limits."""
    write_json(directory / RECORD, report.describe())
    if report.verification is not None and not report.verification.passed:
        failed = "\n".join(report.verification.failures)
        write_text(directory / UNVERIFIED, f"This export does not match the hooked model:\n{failed}\n")


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity: an overflow is reported, not a reason to lose the report."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
