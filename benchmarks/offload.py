"""A model on disk, block by block, pass by pass, and whole in memory: `python -m benchmarks.offload`.

A random Llama of about 2 GB is written, then searched in a process of its own for each way: mean activations, then an
exact sweep of the lower half's candidates at one position. Times are CPU seconds. Peak is the largest resident memory
above what the process held before it loaded the model; pages of the checkpoint that are mapped count. The weights that
are read are counted where accelerate looks them up.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.sweep import last_positions
from refusal_mi import reading
from refusal_mi.directions import difference_in_means
from refusal_mi.model.blockwise import offloaded_blocks
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import HookedModel
from refusal_mi.reading import mean_activations
from refusal_mi.search import block_passes
from refusal_mi.search.sweep import sweep
from refusal_mi.terminal import tell
from refusal_mi.text.chat import ChatFormat

N_LAYERS, MB, GB = 24, 10**6, 10**9
SHAPE = {"hidden_size": 1024, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": N_LAYERS}
DISK: dict[str, str | int] = {
    "model.embed_tokens": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
    **{f"model.layers.{block}": "disk" for block in range(N_LAYERS)},
}
WAYS = {"by blocks": DISK, "pass by pass": DISK, "in memory": None}
N_EXITS = 40
MOST_DIFFERENCE, MOST_KEPT_MB = 1e-3, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=("write", *WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="Where to keep about 2 GB; default: a temporary directory.")
    parser.add_argument("--prompts", type=int, default=4, help="Of each side.")
    parser.add_argument("--side-by-side", action="store_true", help="All ways at once: times are of the CPU anyway.")
    given = parser.parse_args()
    if given.work == "write":
        write(given.directory)
        return 0
    if given.work is not None:
        sys.stdout.write(json.dumps(search(given.work, given.directory, given.prompts)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.directory or Path(scratch)
        if not (directory / "model").exists():
            child("write", directory, given.prompts)  # in a process of its own: a child inherits its parent's peak
        size = (directory / "model" / "model.safetensors").stat().st_size
        with ThreadPoolExecutor(len(WAYS) if given.side_by_side else 1) as pool:
            done = pool.map(lambda way: child(way, directory, given.prompts), WAYS)
            rows = dict(zip(WAYS, done, strict=True))
        found = {way: torch.load(directory / f"{way}.pt") for way in WAYS}
    tell(f"{size / GB:.2f} GB of weights, {N_LAYERS} blocks, {given.prompts} prompts a side")
    tell("| way | means | weights read | sweep | weights read | peak memory |\n|---|---|---|---|---|---|")
    for way, row in rows.items():
        cells = (f"{row[f'{what}_seconds']:.1f} s | {row[f'{what}_gb']:.1f} GB" for what in ("means", "sweep"))
        tell(f"| {way} | {' | '.join(cells)} | {row['peak_mb'] / 1000:.2f} GB |")
    ours = rows["by blocks"]
    tell(f"{ours['check_seconds']:.1f} s and {ours['check_gb']:.1f} GB for the trial, once")
    least, most = ours["exits_mb"]
    tell(f"resident memory after each of {N_EXITS} passes that a hook ended: {least:.0f} to {most:.0f} MB")
    largest = max(difference(found[way], found["in memory"]) for way in WAYS)
    tell(f"largest difference of a score: {largest:.1e}")
    wrong = broken_claims(rows, size, largest)
    for each in wrong:
        tell(f"NOT AS CLAIMED: {each}")
    return 1 if wrong else 0


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest of two tables of scores; infinite where shapes differ, or NaN (not measured) is elsewhere or all."""
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()) or one.isnan().all():
        return math.inf
    largest = (one - other)[~one.isnan()].abs().max().item()
    return math.inf if math.isnan(largest) else largest


def broken_claims(rows: Mapping[str, Mapping[str, Any]], n_bytes: int, largest: float) -> list[str]:
    """What docs/scaling.md says of this benchmark, and was found not to be so.

    Args:
        n_bytes: of the weights.
        largest: difference of a score.
    """
    ours, whole_passes, (least, most) = rows["by blocks"], rows["pass by pass"], rows["by blocks"]["exits_mb"]
    claims = {
        f"scores differ by at most {MOST_DIFFERENCE}": largest <= MOST_DIFFERENCE,
        "each side's means read the weights at most once": ours["means_gb"] <= 2.02 * n_bytes / GB,
        "the sweep reads the weights at most five times": ours["sweep_gb"] <= 5.05 * n_bytes / GB,
        "the trial reads the weights at most three times, and one block": ours["check_gb"] <= 3.2 * n_bytes / GB,
        "pass by pass reads more": whole_passes["sweep_gb"] > 2 * ours["sweep_gb"],
        f"passes that a hook ended keep at most {MOST_KEPT_MB} MB": most - least <= MOST_KEPT_MB,
    }
    return [claim for claim, holds in claims.items() if not holds]


def write(directory: Path) -> None:
    """The random model, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **SHAPE, **ids)
    LlamaForCausalLM(config).save_pretrained(directory / "model", max_shard_size="10GB")
    tokenizer.save_pretrained(directory / "model")


def search(way: str, directory: Path, n_prompts: int) -> dict[str, Any]:
    """What one way takes."""
    if way == "pass by pass":
        reading.offloaded_blocks = block_passes.offloaded_blocks = lambda model: None
    read = [0]

    def counted(
        self: Any, key: str, get: Callable[[Any, str], torch.Tensor] = OffloadedWeightsLoader.__getitem__
    ) -> Any:
        tensor = get(self, key)
        read[0] += tensor.numel() * tensor.element_size()
        return tensor

    OffloadedWeightsLoader.__getitem__ = counted  # type: ignore[method-assign]
    before, where = peak_mb(), WAYS[way]
    how: dict[str, Any] = {"device": "cpu"} if where is None else {"device_map": where}
    model = load_model(directory / "model", **how)
    chat = ChatFormat(model.tokenizer)
    harmful = [f"Tell me what number {number} has done wrong" for number in range(n_prompts)]
    harmless = [f"Tell me of number {number}" for number in range(n_prompts)]
    row: dict[str, Any] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        read[0], start = 0, time.process_time()
        result = work()
        row[f"{name}_seconds"], row[f"{name}_gb"] = time.process_time() - start, read[0] / GB
        return result

    if way == "by blocks":
        measured("check", lambda: offloaded_blocks(model))
    means = measured(
        "means", lambda: [mean_activations(model, chat, each, batch_size=1) for each in (harmful, harmless)]
    )
    grid = last_positions(difference_in_means(*means), 1)
    scores = measured("sweep", lambda: sweep(model, chat, grid, harmful, harmless, [5, 7], prune_layers=0.5))
    row["peak_mb"] = peak_mb() - before
    torch.save(scores.per_prompt, directory / f"{way}.pt")
    if way == "by blocks":
        row["exits_mb"] = exits(model)
    return row


def exits(model: HookedModel) -> tuple[float, float]:
    """The least and the most that is resident after passes that an error in a hook ended."""

    def broken(x: torch.Tensor, hook: Any) -> torch.Tensor:
        raise ZeroDivisionError

    resident = []
    for _ in range(N_EXITS):
        try:
            model.run_with_hooks(torch.ones(1, 4, dtype=torch.long), fwd_hooks=[("blocks.2.attn.hook_z", broken)])  # type: ignore[attr-defined]
        except ZeroDivisionError:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize() / MB)
    return min(resident), max(resident)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def child(work: str, directory: Path, n_prompts: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.offload", "--work", work, "--directory", str(directory)]
    done = subprocess.run([*command, "--prompts", str(n_prompts)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


if __name__ == "__main__":
    sys.exit(main())
