"""From a checkpoint and interventions to an edited checkpoint, with a measurement of how closely it matches."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..interventions import Intervention
from ..weights import EditFigures
from .card import write_card
from .checkpoint import copy_companions
from .compare import VerifyMode, prepare_comparison
from .output import fresh_directory
from .plan import describe_steps
from .prepare import Planned, plan_export
from .report import ExportReport, write_record
from .rewrite import ExportDtype, ShardHashes, byte_bar, rewrite, write_config


@dataclass(frozen=True)
class Written:
    """What a writer of files put into the new directory."""

    figures: Mapping[str, EditFigures]
    hashes: Mapping[str, ShardHashes]
    notes: Sequence[str]
    left_behind: Sequence[str] = ()


def export_checkpoint(
    source: str | Path | None,
    interventions: Intervention | Sequence[Intervention],
    out: str | Path,
    *,
    keep_tied: bool = False,
    dtype: ExportDtype = "keep",
    verify: VerifyMode = "auto",
    prompts: Sequence[str] | None = None,
    revision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a checkpoint that loads with `AutoModelForCausalLM` and behaves like the hooked model.

    Args:
        source: local directory, hub id, or None for the embedded model.
        interventions: `Ablate` and `Add` objects, the same that drive the hooks.
        out: the new directory.
        keep_tied: leave a tied token embedding alone, so that it can stay tied.
        dtype: of the written floating-point tensors.
        verify: "full" loads hooked model and export; "streaming" compares block by block; "auto" chooses by memory.
        prompts: what the two are compared on; None: a few bundled ones.
        force: replace an existing directory.

    Raises:
        UserError: something cannot be exported; nothing is written then.
    """
    plan = plan_export(source, interventions, keep_tied=keep_tied, revision=revision)

    def write(directory: Path) -> Written:
        left = copy_companions(plan.checkpoint, directory)
        with byte_bar(plan.checkpoint.n_bytes, "exporting") as advance:
            done = rewrite(plan.checkpoint, directory, plan.edits, head=plan.untied_head, dtype=dtype, advance=advance)
        write_config(plan.checkpoint, directory, is_untied=plan.is_untied, dtype=dtype)
        return Written(done.figures, done.hashes, plan.notes, left)

    return publish(plan, "checkpoint", out, write, dtype=dtype, verify=verify, prompts=prompts, force=force)


def publish(
    plan: Planned,
    kind: Literal["checkpoint", "adapter"],
    out: str | Path,
    write: Callable[[Path], Written],
    *,
    dtype: ExportDtype = "keep",
    verify: VerifyMode,
    prompts: Sequence[str] | None,
    force: bool,
) -> ExportReport:
    """Write into a directory that has no name yet, compare with the hooked model, add record and card, name it."""
    start = time.perf_counter()
    is_adapter = kind == "adapter"
    original = plan.checkpoint.directory
    with fresh_directory(out, original, force=force) as temporary:
        comparison = prepare_comparison(plan, verify, prompts, is_adapter=is_adapter)
        written = write(temporary)
        verification = None
        if comparison is not None:
            places = (original, temporary) if is_adapter else (temporary, None)
            verification = comparison.measure(*places, figures=written.figures)
        report = ExportReport(
            path=Path(out).expanduser().absolute(),
            kind=kind,
            source=plan.source,
            revision=plan.revision,
            interventions=describe_steps(plan.steps),
            figures=written.figures,
            hashes=written.hashes,
            dtype=dtype,
            is_untied=plan.is_untied and not is_adapter,
            keeps_tie=plan.keeps_tie,
            head_bytes=0 if is_adapter else plan.head_bytes,
            left_behind=written.left_behind,
            notes=written.notes,
            seconds=time.perf_counter() - start,
            verification=verification,
        )
        write_record(report, temporary)
        write_card(report, temporary / "README.md")
    return report
