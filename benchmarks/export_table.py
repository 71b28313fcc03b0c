"""Measure the tables of docs/export.md and write them there: `python -m benchmarks.export_table`."""

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from refusal_mi.export import plan
from refusal_mi.export.export import export_checkpoint
from refusal_mi.files import write_json, write_text
from refusal_mi.interventions import Ablate
from refusal_mi.weights import Projection
from tests.helpers.directions import random_direction
from tests.helpers.exports import (
    EXACT,
    FUSED_EXPERTS,
    POST_NORM,
    hooked_logits,
    largest_component,
    plain_logits,
    save_model,
)
from tests.helpers.models import FAMILIES, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
WIDTHS = (32, 128, 512)
HEADER = (
    "| family | difference, float32 | difference, float64 | effect | left along r | plain orthogonalization leaves |\n"
    "|---|---|---|---|---|---|\n"
)


def measure(family: str, scratch: Path) -> dict[str, float | None]:
    """One row: an export of each dtype, reloaded from disk."""
    direction = random_direction(1)
    ablation = Ablate(direction)
    row: dict[str, float | None] = {"float64": None}
    for dtype in ("float32",) if family in FUSED_EXPERTS else ("float32", "float64"):
        source, out = scratch / f"{family}-{dtype}", scratch / f"{family}-{dtype}-out"
        save_model(family, source, getattr(torch, dtype))
        export_checkpoint(source, ablation, out, verify="none")
        hooked = hooked_logits(source, [ablation], dtype)
        row[dtype] = (plain_logits(out, dtype) - hooked).abs().max().item()
        row["effect"] = (plain_logits(source, dtype) - hooked).abs().max().item()
    if family not in FUSED_EXPERTS:
        row["left"] = largest_component(out, direction)
        with patch.object(plan, "writer_projection", _plain):
            export_checkpoint(source, ablation, out, verify="none", force=True)
        row["plain"] = largest_component(out, direction)
    return row


def _plain(basis: torch.Tensor, strength: float, gain: object) -> Projection:
    return Projection(basis.T, basis, strength)


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Markdown."""
    lines = [HEADER]
    for family, row in rows.items():
        cells = [_cell(row.get(key)) for key in ("float32", "float64", "effect", "left", "plain")]
        lines.append(f"| {family.removesuffix('_text')} | {' | '.join(cells)} |\n")
    return "".join(lines)


def write_wide_model(family: str, width: int, directory: Path, dtype: torch.dtype) -> None:
    """A random model of any width, with outputs of the same size whatever the width and norm gains 1 + 0.3 N(0, 1)."""
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | shape | ids))
    offset = 0.0 if family.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.15 if "embed" in name else 0.85 / parameter.shape[-1] ** 0.5
            noise = torch.randn_like(parameter)
            parameter.copy_(offset + 0.3 * noise if parameter.ndim == 1 else scale * noise)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def post_norm_share(family: str, width: int, dtype: str, scratch: Path) -> float:
    """Largest logit difference to the hooked model, as a fraction of what the edit changes."""
    source, out = scratch / f"{family}-{width}-{dtype}", scratch / f"{family}-{width}-{dtype}-out"
    ablation = Ablate(random_direction(1, width=width))
    write_wide_model(family, width, source, getattr(torch, dtype))
    export_checkpoint(source, ablation, out, verify="none")
    hooked = hooked_logits(source, [ablation], dtype)
    difference = (plain_logits(out, dtype) - hooked).abs().max()
    return (difference / (plain_logits(source, dtype) - hooked).abs().max()).item()


def width_table(shares: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    columns = list(next(iter(shares.values())))
    lines = [f"| family | {' | '.join(columns)} |\n", "|---" * (len(columns) + 1) + "|\n"]
    for family, row in shares.items():
        lines.append(f"| {family.removesuffix('_text')} | {' | '.join(f'{row[key]:.1%}' for key in columns)} |\n")
    return "".join(lines)


def replace_table(page: str, mark: str, text: str) -> str:
    """The page with another table between `<!-- mark -->` and `<!-- end -->`."""
    before, start, rest = page.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert start and end
    return f"{before}{start}\n{text}\n{end}{after}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.0e}"


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        rows = {family: measure(family, Path(scratch)) for family in (*EXACT, *POST_NORM)}
        shares: dict[str, dict[str, float]] = {}
        for family in POST_NORM:
            shares[family] = {"width 32, float32": post_norm_share(family, 32, "float32", Path(scratch))}
            for width in WIDTHS:
                shares[family][f"width {width}, float64"] = post_norm_share(family, width, "float64", Path(scratch))
    write_json(PAGE.with_name("export_families.json"), {"families": rows, "post_norm_shares": shares})
    page = replace_table(PAGE.read_text(encoding="utf-8"), "table", table(rows))
    write_text(PAGE, replace_table(page, "widths", width_table(shares)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
