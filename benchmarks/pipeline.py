"""The whole of `refusal-mi run` on the embedded model against HF `generate` of the same completions alone."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, compare, load_both, report
from refusal_mi.cli import exit_status
from refusal_mi.text.batches import batches_by_length, left_pad
from refusal_mi.text.chat import ChatFormat

BATCH_SIZE, NEW_TOKENS = 64, 64


def run(folder: Path) -> list[tuple[str, str]]:
    """All steps and the report; returns (prompt, answer) of every completion."""
    assert exit_status(["run", "--fresh", "--json", "--device", "cpu", "--output-dir", str(folder)]) == 0
    files = sorted(folder.glob("completions/*_completions.json"))
    return [(row["prompt"], row["response"]) for file in files for row in json.loads(file.read_text())]


@torch.no_grad()
def generate_alone(model: Any, chat: ChatFormat, prompts: list[str]) -> int:
    """As many answers from the plain model."""
    rows = [chat.encode(prompt) for prompt in prompts]
    for indices in batches_by_length(rows, BATCH_SIZE):
        batch = left_pad([rows[index] for index in indices], chat.pad_id)
        model.generate(batch.tokens, attention_mask=batch.mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return len(rows)


def main() -> None:
    """Run one row."""
    args = arguments(__doc__)
    _, plain, tokenizer = load_both("embedded", "cpu")
    chat = ChatFormat(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        prompts = [prompt for prompt, _ in run(Path(scratch) / "run")]
        row = compare(
            "refusal-mi run, embedded, cpu",
            lambda: generate_alone(plain, chat, prompts),
            lambda: len(run(Path(scratch) / "run")),
            lambda a, b: abs(a - b),
            must_reach=1 / 3,
            n_pairs=args.pairs,
            largest_allowed=0,
            note=f"{len(prompts)} answers; difference in their number",
        )
    report(row)


if __name__ == "__main__":
    main()
