"""What an audit says of checkpoints that were changed in known ways: `python -m benchmarks.audit` writes docs/audit.md.

The embedded model: about a minute. With --run RUN_DIR, the run of a real model, that model's table too (the 0.5B model
of docs/real-models.md: some minutes, and 4 GB of disk).
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

from benchmarks.export_table import replace_table
from refusal_mi.audit import audit
from refusal_mi.directions import Direction
from refusal_mi.export import export_adapter, export_checkpoint, load_adapter
from refusal_mi.files import as_json, read_json, read_tensors, write_text
from refusal_mi.interventions import Ablate
from refusal_mi.model.loading import ORGANISM
from tests.helpers.audit import (
    audited_alone,
    centred,
    changed,
    columns_kept,
    compressed,
    fine_tuned,
    low_rank,
    projection,
    quantized,
    rows_kept,
)

PAGE = Path(__file__).parent.parent / "docs" / "audit.md"
COLUMNS = (
    "what was done to BASE",
    "verdict",
    "lost it",
    "cosine",
    "strength",
    "left",
    "explains",
    "least fit",
    "largest other",
)
OF_REAL = (
    "all writes (export)",
    "blocks 6 to 17 (export)",
    "LoRA adapter (export), merged by PEFT",
    "row norms kept",
    "a random LoRA of rank 8",
    "rounded to 8 bits",
)
"""What is done to a real model."""
Make = Callable[[Path, Path], object]
"""Of a source and a new folder: the changed copy."""


def removals(r: Direction, band: range) -> dict[str, Make]:
    """Edits that remove a direction."""
    unit, other = r.unit, r.random_like(seed=0)
    inside = rf"layers\.({'|'.join(map(str, band))})\."
    return {
        "all writes (export)": partial(export, what=Ablate(r)),
        f"blocks {band[0]} to {band[-1]} (export)": partial(export, what=Ablate(r, layers=band)),
        "strength .3 (export)": partial(export, what=Ablate(r, strength=0.3)),
        "two directions, r and a random one (export)": partial(export, what=Ablate([r, other])),
        "LoRA adapter (export), as it is": partial(adapter, what=Ablate(r, layers=band)),
        "LoRA adapter (export), merged by PEFT": partial(merged, what=Ablate(r, layers=band)),
        "row norms kept": partial(changed, change=rows_kept(unit), which=inside),
        "column norms kept": partial(changed, change=columns_kept(unit), which=inside),
        "all writes, then 8 bits": then(projection(unit[None]), quantized(8)),
        "all writes, then 4 bits": then(projection(unit[None]), quantized(4)),
        "all writes, then a random LoRA of rank 8": then(projection(unit[None]), low_rank(8)),
        "a random direction, all writes": partial(export, what=Ablate(other)),
    }


def controls(r: Direction) -> dict[str, Make]:
    """Changes that remove none, or none that matters."""
    return {
        "a random LoRA of rank 1": partial(changed, change=low_rank(1)),
        "a random LoRA of rank 8": partial(changed, change=low_rank(8)),
        "rounded to 8 bits": partial(changed, change=quantized(8)),
        "rounded to 4 bits": partial(changed, change=quantized(4)),
        "every tensor cut to 97% of its rank": partial(changed, change=compressed()),
        "every tensor centred": partial(changed, change=centred),
        "a tenth smaller": partial(changed, change=lambda matrix: 0.9 * matrix),
        "r amplified by half": partial(changed, change=projection(r.unit[None], -0.5)),
        "stored as float16": partial(changed, change=lambda matrix: matrix, dtype=torch.float16),
    }


def trained() -> dict[str, Make]:
    """Training of the embedded model: all weights, and what taught it to refuse, undone."""
    return {
        "6 steps of AdamW, all weights": fine_tuned,
        "60 steps, a larger rate": partial(fine_tuned, n_steps=60, rate=1e-3),
        "20 steps with weight decay": partial(fine_tuned, n_steps=20, decay=10.0),
        "what it was before its refusals were taught": lambda source, out: shutil.copytree(
            ORGANISM.parent / "stage1", out
        ),
    }


def export(source: Path, out: Path, *, what: Ablate) -> None:
    export_checkpoint(source, what, out, verify="none")


def adapter(source: Path, out: Path, *, what: Ablate) -> None:
    export_adapter(source, what, out, verify="none")


def merged(source: Path, out: Path, *, what: Ablate) -> None:
    adapter(source, out / "adapter", what=what)
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), out / "adapter")
    adapted.merge_and_unload().save_pretrained(out)
    shutil.rmtree(out / "adapter")


def then(first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """Both, one after the other."""
    return partial(changed, change=lambda matrix: second(first(matrix)))


def row(name: str, record: Mapping[str, Any], *more: str) -> str:
    """A line of the table."""
    lost = [each for each in record["writers"] if each["is_removal"]]
    n_differ = sum(each["change"] > 0 and not each["is_rounding"] for each in record["writers"])
    cells = [name, record["verdict"], f"{len(lost)} of {n_differ}" if n_differ else "–"]
    cells += [", ".join(f"{each:.4f}" for each in record["cosines"]) or "–"]
    cells += [f"{median(each[key] for each in lost):.3f}" if lost else "–" for key in ("strength", "left", "explained")]
    cells += [f"{min(each['fit'] for each in lost):.2f}" if lost else "–"]
    fits = [each["fit"] for each in record["writers"] if not each["is_removal"] and each["change"] > 0]
    cells += [f"{max(fits):.2f}" if fits else "–", *more]
    return f"| {' | '.join(cells)} |\n"


def table(source: Path, r: Direction, makes: Mapping[str, Make], *, alone: bool = False) -> str:
    """Markdown: every change, made and audited; with what an audit costs where each is a process of its own."""
    columns = (*COLUMNS, "seconds", "MiB") if alone else COLUMNS
    lines = [f"| {' | '.join(columns)} |\n", f"{'|---' * len(columns)}|\n"]
    with tempfile.TemporaryDirectory() as scratch:
        r.save(Path(scratch) / "r.pt")
        for name, make in makes.items():
            out = Path(scratch) / "out"
            make(source, out)
            if alone:
                found = audited_alone(source, out, "--direction", str(Path(scratch) / "r.pt"))
                lines.append(row(name, found.record, f"{found.seconds:.0f}", f"{found.peak_mib:.0f}"))
            else:
                lines.append(row(name, as_json(audit(source, out, r))))
            sys.stdout.write(lines[-1])
            sys.stdout.flush()
            shutil.rmtree(out)
    return "".join(lines)


def put(mark: str, text: str) -> None:
    """Write a table into the page."""
    write_text(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), mark, text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="Run folder of a real model, which REFUSAL_MI_REAL_MODELS holds.")
    parser.add_argument("--only-real", action="store_true", help="Leave the embedded model's table as it is.")
    given = parser.parse_args()
    logging.set_verbosity_error()
    if not given.only_real:
        planted = read_tensors(ORGANISM.parent / "planted_direction.pt").reshape(-1)
        r = Direction.of(planted, layer=3)
        makes = {**removals(r, range(3, 7)), **controls(r), **trained()}
        put("embedded", table(ORGANISM, r, makes))
    if given.run is not None:
        r = Direction.load(given.run)
        source = (
            Path(os.environ["REFUSAL_MI_REAL_MODELS"]) / Path(read_json(given.run / "run.json")["model"]["source"]).name
        )
        makes = {name: make for name, make in {**removals(r, range(6, 18)), **controls(r)}.items() if name in OF_REAL}
        put("real", table(source, r, makes, alone=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
