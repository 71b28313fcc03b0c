"""Peak memory and time of an export beside a plain load-edit-save: `python benchmarks/export_memory.py`.

A random sharded Llama of about 2 GB in bfloat16 is written, then exported in one process and loaded, edited and saved
with `AutoModelForCausalLM` in another. The figures are each process's largest resident memory and its time.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from refusal_mi.directions import Direction
from refusal_mi.export.export import export_checkpoint
from refusal_mi.interventions import Ablate
from refusal_mi.model.writers import build_skeleton

CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
SHARD_BYTES = 500 * 10**6
ALLOWED_MB = 500
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=("write", "export", "plain"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--directory", type=Path, default=None, help="Where to put about 6 GB; default: a temporary one."
    )
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="Blocks of the random model.")
    given = parser.parse_args()
    if given.work is not None:
        _work(given.work, given.directory, given.layers)
        return 0
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        # Written by a process of its own: a child inherits its parent's peak memory.
        _measured("write", Path(scratch), given.layers)
        sizes = [path.stat().st_size for path in (Path(scratch) / "source").glob("*.safetensors")]
        largest, total = max(sizes), sum(sizes)
        ours, plain = (_measured(work, Path(scratch), given.layers) for work in ("export", "plain"))
    limit = largest / MB + ALLOWED_MB
    record = {
        "checkpoint_mb": round(total / MB),
        "largest_shard_mb": round(largest / MB),
        "limit_mb": round(limit),
        "export": ours,
        "plain_load_edit_save": plain,
        "memory_ratio": round(ours["peak_mb"] / plain["peak_mb"], 3),
        "time_ratio": round(ours["seconds"] / plain["seconds"], 3),
        "cpu_time_ratio": round(ours["cpu_seconds"] / plain["cpu_seconds"], 3),
        "within_limit": ours["peak_mb"] <= limit,
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return 0 if record["within_limit"] else 1


def write_random_checkpoint(directory: Path, n_layers: int) -> None:
    """A Llama of random weights in shards, one shard in memory at a time."""
    directory.mkdir(parents=True)
    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": n_layers})
    config.save_pretrained(directory)
    shards: list[dict[str, torch.Size]] = [{}]
    room = SHARD_BYTES
    for name, parameter in build_skeleton(config).named_parameters():
        size = 2 * parameter.numel()
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = parameter.shape
        room -= size
    names = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        names |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _direction() -> Direction:
    vector = torch.randn(int(CONFIG["hidden_size"]), generator=torch.Generator().manual_seed(0))
    return Direction(vector, 8, "blocks.8.hook_resid_pre")


def _work(work: str, directory: Path, n_layers: int) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    if work == "write":
        write_random_checkpoint(directory / "source", n_layers)
    elif work == "export":
        export_checkpoint(directory / "source", Ablate(_direction()), directory / "export", verify="none")
    else:
        _load_edit_save(directory / "source", directory / "plain")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    row = {"peak_mb": round(peak), "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
    sys.stdout.write(json.dumps(row) + "\n")


@torch.no_grad()
def _load_edit_save(source: Path, target: Path) -> None:
    """What most tools do: the whole model in memory, projections in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    unit = _direction().unit.float()
    matrices = [model.model.embed_tokens.weight.T]
    for block in model.model.layers:
        matrices += [block.self_attn.o_proj.weight, block.mlp.down_proj.weight]
    for matrix in matrices:
        wide = matrix.float()
        matrix.copy_(wide - torch.outer(unit, unit @ wide))
    model.save_pretrained(target, max_shard_size=SHARD_BYTES)


def _measured(work: str, directory: Path, n_layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", work, "--directory", str(directory)]
    command += ["--layers", str(n_layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
