"""What each stage costs against layers, width, vocabulary, positions and prompts: a fitted line, with its error.

`python -m benchmarks.costs` measures random Llamas of several shapes and fits, for each stage,
seconds = a · layer calls + b · block work + c · unembedding work, with no negative coefficient.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common import RESULTS, describe_machine
from refusal_mi.directions import DirectionGrid, difference_in_means
from refusal_mi.files import read_json, write_json
from refusal_mi.generation import generate
from refusal_mi.measures import ce_loss, texts_to_score
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import HookedModel
from refusal_mi.reading import mean_activations
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_NEW, N_REPEATS = 16, 3
TERMS = ("layer call", "block multiply-add", "unembedding multiply-add")


@dataclass(frozen=True)
class Shape:
    """One measured point."""

    n_layers: int = 6
    d_model: int = 256
    vocabulary: int = 8192
    n_positions: int = 3
    n_prompts: int = 16

    @property
    def block_size(self) -> int:
        """Parameters of all blocks: attention 4 d², a gated MLP of width 3 d."""
        return self.n_layers * 13 * self.d_model**2


SHAPES = tuple(
    replace(Shape(), **{name: value})
    for name, values in {
        "n_layers": (3, 6, 12),
        "d_model": (128, 512),
        "vocabulary": (2048, 32768),
        "n_positions": (1, 5),
        "n_prompts": (8, 32),
    }.items()
    for value in values
)


def build(shape: Shape, directory: Path, device: str) -> HookedModel:
    """A random Llama of this shape with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=3 * shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.d_model // 32,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_model(directory, device=device)  # type: ignore[arg-type]


def seconds(work: Callable[[], object]) -> float:
    """The fastest of some runs after one that does not count."""
    work()
    times = []
    for _ in range(N_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(shape: Shape, model: HookedModel) -> dict[str, tuple[float, list[float]]]:
    """Seconds and the three amounts of work of every stage."""
    chat = ChatFormat(model.tokenizer)
    sets = [load_prompts(f"organism_{side}_train").instructions[: shape.n_prompts] for side in ("harmful", "harmless")]
    texts = texts_to_score(chat, load_prompts("organism_plain_text").instructions[: shape.n_prompts])
    lengths = [len(model.tokenizer(chat.render(text))["input_ids"]) for text in sets[0] + sets[1]]
    prompt = sum(lengths) / len(lengths)
    n_text = sum(
        len(model.tokenizer(text)["input_ids"])
        for text in load_prompts("organism_plain_text").instructions[: shape.n_prompts]
    )
    full = difference_in_means(*(mean_activations(model, chat, one) for one in sets))
    last = slice(-shape.n_positions, None)
    grid = DirectionGrid(full.vectors[last], full.positions[last], full.is_degenerate[last])
    n, d, size = shape.n_prompts, shape.d_model, shape.block_size
    head = d * shape.vocabulary
    candidates = shape.n_positions * (shape.n_layers - 1)
    works: dict[str, tuple[Callable[[], object], list[float]]] = {
        "mean activations": (
            lambda: mean_activations(model, chat, sets[0]),
            [shape.n_layers, n * prompt * size, 0.0],
        ),
        "exact search": (
            lambda: sweep(model, chat, grid, *sets, [40]),
            [candidates * shape.n_layers, candidates * 2.5 * n * prompt * size, candidates * 3 * n * head],
        ),
        f"completions of {N_NEW} tokens": (
            lambda: generate(model, chat, sets[0], max_new_tokens=N_NEW),
            [N_NEW * shape.n_layers, n * (prompt + N_NEW) * size, n * N_NEW * head],
        ),
        "CE loss": (
            lambda: ce_loss(model, chat, texts),
            [shape.n_layers, n_text * size, n_text * head],
        ),
    }
    return {name: (seconds(work), amounts) for name, (work, amounts) in works.items()}


def fit(points: list[tuple[float, list[float]]]) -> dict[str, Any]:
    """Coefficients in seconds per unit, by least squares of relative errors, and those errors."""
    times = np.array([time for time, _ in points])
    amounts = np.array([amount for _, amount in points])
    scale = amounts.max(axis=0).clip(min=1.0)
    found, _ = nnls(amounts / scale / times[:, None], np.ones(len(times)))
    errors = np.abs(amounts / scale @ found / times - 1)
    coefficients = dict(zip(TERMS, (found / scale).tolist(), strict=True))
    return {
        "n": len(points),
        "coefficients": coefficients,
        "median_error": float(np.median(errors)),
        "largest_error": float(errors.max()),
    }


def main() -> int:
    """Measure, fit, print and keep in `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for shape in dict.fromkeys(SHAPES):
        with tempfile.TemporaryDirectory() as scratch:
            for name, point in measure(shape, build(shape, Path(scratch), device)).items():
                points.setdefault(name, []).append(point)
    known = read_json(RESULTS) if RESULTS.exists() else {"machine": {}, "rows": {}}
    known["machine"] = describe_machine()
    known["costs"] = {name: fit(found) for name, found in points.items()}
    write_json(RESULTS, known)
    for name, found in known["costs"].items():
        per = ", ".join(f"{value:.2e} s per {term}" for term, value in found["coefficients"].items() if value)
        sys.stdout.write(
            f"{name}: {per}; error {found['median_error']:.0%} median, {found['largest_error']:.0%} largest\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
