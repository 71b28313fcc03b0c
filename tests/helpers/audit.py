"""Copies of checkpoints that were changed in a known way, written a second way: without the package's own edits."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Change = Callable[[Tensor], Tensor]
"""Of W as [d_model, inputs] in float64, large ones in float32: what it becomes."""
WRITERS = re.compile(r"embed_tokens\.weight|o_proj\.weight|down_proj\.weight")
"""Of the families that are named like Llama."""


def changed(source: Path, target: Path, change: Change, *, which: str = "", dtype: torch.dtype | None = None) -> Path:
    """A copy in which every writer whose name has `which` is changed; in another dtype all tensors are."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                kept = tensor.dtype if dtype is None else dtype
                if WRITERS.search(name) and re.search(which, name):
                    is_rows = "embed_tokens" in name
                    wide = tensor.double() if tensor.numel() < 2**26 else tensor.float()
                    new = change(wide.T if is_rows else wide)
                    tensor = new.T if is_rows else new
                tensors[name] = tensor.to(kept).contiguous()
            save_file(tensors, target / path.name, {"format": "pt"})
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
    if dtype is not None:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return target


def projection(basis: Tensor, strength: float = 1.0) -> Change:
    """W − strength · QᵀQ W, for orthonormal rows."""

    def change(matrix: Tensor) -> Tensor:
        rows = basis.to(matrix.dtype)
        return matrix - strength * rows.T @ (rows @ matrix)

    return change


def rows_kept(unit: Tensor) -> Change:
    """The direction is removed from W with rows of length 1, which then get back their length."""

    def change(matrix: Tensor) -> Tensor:
        size = matrix.norm(dim=1, keepdim=True)
        rows = projection(unit[None])(matrix / size)
        return size * rows / rows.norm(dim=1, keepdim=True)

    return change


def columns_kept(unit: Tensor) -> Change:
    """The direction is removed from W, whose columns then get back their length."""

    def change(matrix: Tensor) -> Tensor:
        left = projection(unit[None])(matrix)
        return left * matrix.norm(dim=0) / left.norm(dim=0).clamp(min=1e-30)

    return change


def low_rank(rank: int, size: float = 0.05) -> Change:
    """A random change of a rank, `size` times as large as W."""
    generator = torch.Generator().manual_seed(0)

    def change(matrix: Tensor) -> Tensor:
        left = torch.randn(len(matrix), rank, generator=generator, dtype=matrix.dtype)
        right = torch.randn(rank, matrix.shape[1], generator=generator, dtype=matrix.dtype)
        added = left @ right
        return matrix + added * size * matrix.norm() / added.norm()

    return change


def compressed(share: float = 0.97) -> Change:
    """Only the largest of its singular values are kept, that share of them."""

    def change(matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        n = int(share * len(values))
        return left[:, :n] @ (values[:n, None] * right[:n])

    return change


def centred(matrix: Tensor) -> Tensor:
    """Every input writes with mean zero, which LayerNorm would make of it anyway."""
    return matrix - matrix.mean(0)


def quantized(n_bits: int) -> Change:
    """Rounded to integers of so many bits, scaled by the largest of every row, and back."""
    most = 2 ** (n_bits - 1) - 1

    def change(matrix: Tensor) -> Tensor:
        scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / most
        return (matrix / scale).round() * scale

    return change


def fine_tuned(source: Path, target: Path, *, n_steps: int = 6, rate: float = 3e-4, decay: float = 0.0) -> Path:
    """All weights trained on random text for a few steps."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        tokens = torch.randint(0, model.config.vocab_size, (4, 24), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)
    model.to(torch.bfloat16).save_pretrained(target)
    return target


@dataclass(frozen=True)
class Alone:
    """An audit in a process of its own."""

    record: dict[str, Any]
    seconds: float
    peak_mib: float
    """Resident memory at its most, Python and its libraries too (Linux)."""


_COMMAND = """
import sys
from refusal_mi.cli import exit_status
status = exit_status(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


def audited_alone(base: Path, suspect: Path, *options: str) -> Alone:
    """`refusal-mi audit BASE SUSPECT --json`.

    Raises:
        CalledProcessError: its status is not 0.
    """
    start = time.perf_counter()
    line = [sys.executable, "-c", _COMMAND, "audit", str(base), str(suspect), "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ)
    seconds = time.perf_counter() - start
    return Alone(json.loads(done.stdout), seconds, int(done.stderr.split()[-1]) / 1024)
