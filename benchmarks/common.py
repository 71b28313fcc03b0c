"""What every benchmark shares: models, templates, pairwise timing, peak memory, and how results are kept."""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from refusal_mi.files import read_json, write_json
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import HookedModel

RESULTS = Path(__file__).parent / "results.json"
GPU_RESULTS = Path(__file__).parent / "results-gpu.json"
LONG_SYSTEM = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "You are a helpful and honest assistant. Answer plainly."
)
"""Gives the template about the length of Llama-3's, which puts dates before every instruction."""

SHAPES = {
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = {"110m": 32_000, "8b": 128_256}


@dataclass(frozen=True)
class Comparison:
    """One row of the table: the straightforward way against ours, measured pairwise in one process."""

    name: str
    ratio: float
    """Median over pairs of straightforward seconds / our seconds."""
    ratio_low: float
    ratio_high: float
    straightforward_seconds: float
    our_seconds: float
    straightforward_peak_mib: float
    our_peak_mib: float
    """Most memory above what was held before; on a GPU the device's, else the process's."""
    largest_difference: float
    """Between the two results, in the unit that the benchmark names."""
    must_reach: float
    """The least ratio that the row promises."""
    note: str


@dataclass(frozen=True)
class Measured:
    """What one run gave, took and held."""

    result: Any
    seconds: float
    peak_mib: float


def build_model(name: str, device: str, directory: Path) -> Path:
    """The directory of the embedded model, or of a random Llama of a given shape that shares its tokenizer."""
    if name == "embedded":
        return ORGANISM
    target = directory / name
    if not target.exists():
        torch.manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        config = LlamaConfig(vocab_size=VOCABULARY[name], max_position_embeddings=2048, dtype=dtype, **SHAPES[name])
        tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        with torch.device(device):
            model = LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def load_both(name: str, device: str) -> tuple[HookedModel, Any, Any]:
    """The hooked model, the plain HF model and the tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = build_model(name, device, Path(scratch))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        hooked = load_model(directory, device=device)  # type: ignore[arg-type]
    for model in (plain, hooked):
        _own_memory(model)
    return hooked, plain, hooked.tokenizer


def _own_memory(model: Any) -> None:
    """Copy weights out of the mapped file, whose pages would count as memory of whoever reads them first."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def compare(
    name: str,
    straightforward: Callable[[], Any] | Measured,
    ours: Callable[[], Any],
    difference: Callable[[Any, Any], float],
    *,
    must_reach: float,
    n_pairs: int,
    largest_allowed: float = 1e-4,
    memory: Literal["process", "tensors"] = "process",
    note: str = "",
) -> Comparison:
    """Time A B A B ... after one untimed pair, whose results are compared and whose memory is measured.

    Args:
        straightforward: work of minutes is measured once beforehand, and ours is then run and timed once.
        memory: "process": of the whole process, sampled; "tensors": exactly what tensors hold, from a further run.

    Raises:
        AssertionError: the results differ by more than `largest_allowed`.
    """
    is_measured = isinstance(straightforward, Measured)
    first, ours_first = straightforward if is_measured else measured(straightforward), measured(ours)
    largest = difference(first.result, ours_first.result)
    assert largest <= largest_allowed, f"{name}: the results differ by {largest}"
    times = [(first.seconds, ours_first.seconds)]
    if not is_measured:
        times = [(_seconds(straightforward), _seconds(ours)) for _ in range(n_pairs)]
    ratios = [a / b for a, b in times]
    peaks = first.peak_mib, ours_first.peak_mib
    if memory == "tensors" and not is_measured:
        peaks = tensor_peak_mib(straightforward), tensor_peak_mib(ours)
    return Comparison(
        name,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        *peaks,
        largest,
        must_reach,
        note,
    )


def measured(work: Callable[[], Any]) -> Measured:
    """Run `work`; peak memory above what was held before, on a CPU sampled every 2 ms."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Measured(result, seconds, (torch.cuda.max_memory_allocated() - before) / 2**20)
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return Measured(result, seconds, max(0, peak[0] - before) / 2**20)


def tensor_peak_mib(work: Callable[[], Any]) -> float:
    """The most that tensors made by `work` hold at once, from torch's own record of every allocation."""
    if torch.cuda.is_available():
        return measured(work).peak_mib
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 2**20


def report(comparison: Comparison) -> None:
    """Print one row and keep it in `results.json`, or where it was measured on a GPU's, with the machine."""
    row, path = asdict(comparison), GPU_RESULTS if torch.cuda.is_available() else RESULTS
    known = read_json(path) if path.exists() else {"machine": {}, "rows": {}}
    known["machine"] = describe_machine()
    known["rows"][comparison.name] = row
    write_json(path, known)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def arguments(description: str) -> argparse.Namespace:
    """--model, --device, --pairs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=["embedded", *SHAPES], default="embedded")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--long-template", action="store_true")
    parser.add_argument("--splits", type=Path, help="Folder of the published splits, instead of the embedded prompts.")
    parser.add_argument("--positions", type=int, help="Only candidates of the last so many positions.")
    return parser.parse_args()


def _seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
