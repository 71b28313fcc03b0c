"""Do the same numbers come again, and with other prompts in the batch? Per dtype, on the device that is there.

`python -m benchmarks.repeats [MODEL] [--device cuda]` prints the table of docs/scaling.md: refusal scores of
64 prompts and their greedy answers under ablation of a random direction, asked twice in batches of 32, and once each in
batches of 1, 8 and 64.
"""

import argparse
from dataclasses import dataclass

import torch

from refusal_mi.directions import Direction
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.measures import refusal_scores
from refusal_mi.model.loading import quiet_load
from refusal_mi.terminal import tell
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_PROMPTS, N_NEW, BATCH_SIZE, OTHERS = 64, 24, 32, (1, 8, 64)
DTYPES = ("float32", "bfloat16")
HEADER = """\
| dtype | batches of | largest difference of a score, nats | score moved by (median) | answers that differ |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Repeat:
    """One way of asking again, against batches of 32."""

    dtype: str
    batch_size: int
    largest: float
    median: float
    n_other: int

    def __str__(self) -> str:
        batches = f"{self.batch_size}, again" if self.batch_size == BATCH_SIZE else str(self.batch_size)
        return f"| {self.dtype} | {batches} | {self.largest:.1e} | {self.median:.1e} | {self.n_other} of {N_PROMPTS} |"


def repeats(source: str | None, device: str, dtype: str) -> list[Repeat]:
    """Of a model in a dtype."""
    model = quiet_load(source, device=device, dtype=dtype)  # type: ignore[arg-type]
    chat = ChatFormat(model.tokenizer)
    sides = [load_prompts(f"organism_{side}_train").instructions for side in ("harmful", "harmless")]
    prompts = [each for pair in zip(*sides, strict=False) for each in pair][:N_PROMPTS]
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    ablation = Ablate(Direction.of(vector, layer=model.cfg.n_layers // 2))
    refusing = [tuple(model.tokenizer("I", add_special_tokens=False)["input_ids"])]

    def ask(batch_size: int) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        scores = refusal_scores(model, chat, prompts, refusing, interventions=ablation, batch_size=batch_size)
        given = {"max_new_tokens": N_NEW, "batch_size": batch_size, "description": f"{dtype}, {batch_size}"}
        return scores, [each.token_ids for each in generate(model, chat, prompts, interventions=ablation, **given)]  # type: ignore[arg-type]

    first, answers = ask(BATCH_SIZE)
    found = []
    for batch_size in (BATCH_SIZE, *OTHERS):
        scores, others = ask(batch_size)
        moved, n_other = (scores - first).abs(), sum(a != b for a, b in zip(answers, others, strict=True))
        found.append(Repeat(dtype, batch_size, moved.max().item(), moved.median().item(), n_other))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    tell(HEADER)
    for dtype in DTYPES:
        for each in repeats(args.model, args.device, dtype):
            tell(str(each))


if __name__ == "__main__":
    main()
