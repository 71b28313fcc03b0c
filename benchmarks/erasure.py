"""What linear probes still read after erasure, on held-out prompts: `python -m benchmarks.erasure`."""

from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from refusal_mi.estimators.erasure import fit_eraser
from refusal_mi.files import write_text
from refusal_mi.model.loading import load_model
from refusal_mi.reading import template_residuals
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"
START, END = "<!-- erasure -->\n", "<!-- end -->"
LAYERS, N_TRAIN, N_TEST, N_NULL = (1, 3, 5, 9), 128, 100, 200


def main() -> None:
    """Read the last position's stream, erase, fit a probe, and fit it to permuted labels."""
    model = load_model(device="cpu")
    chat = ChatFormat(model.tokenizer)
    sides = ("harmful", "harmless")
    train, test = (
        [
            template_residuals(model, chat, load_prompts(f"organism_{side}_{part}")[:n], layers=LAYERS, n_last=1)[:, 0]
            for side in sides
        ]
        for part, n in (("train", N_TRAIN), ("test", N_TEST))
    )
    lines = ["| layer | plain | r projected out | LEACE | LEACE, permuted labels: 95% of 200 |", "|---" * 5 + "|"]
    for column, layer in enumerate(LAYERS):
        fitted, held = ([rows[:, column].double() for rows in part] for part in (train, test))
        lines.append(f"| {layer} | " + " | ".join(cells(fitted, held)) + " |")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    write_text(PAGE, before + START + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


def cells(train: list[Tensor], test: list[Tensor]) -> list[str]:
    """Held-out accuracy as it is, without the difference of means, after LEACE, and its null."""
    eraser = fit_eraser(*train)
    unit = torch.nn.functional.normalize(train[0].mean(0) - train[1].mean(0), dim=0)
    rows, labels = torch.cat(train), torch.tensor([1] * len(train[0]) + [0] * len(train[1]))
    held, truth = torch.cat(test), torch.tensor([1] * len(test[0]) + [0] * len(test[1]))

    def accuracy(one: Tensor, other: Tensor, of_train: Tensor) -> float:
        scale = one.std(0).clamp(min=1e-9)
        probe = LogisticRegression(max_iter=2000).fit((one / scale).numpy(), of_train.numpy())
        return float(probe.score((other / scale).numpy(), truth.numpy()))

    def without(x: Tensor) -> Tensor:
        return x - (x @ unit)[:, None] * unit

    generator = torch.Generator().manual_seed(0)
    erased, held_erased = eraser(rows), eraser(held)
    null = sorted(
        accuracy(erased, held_erased, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(N_NULL)
    )
    found = [accuracy(rows, held, labels), accuracy(without(rows), without(held), labels)]
    found.append(accuracy(erased, held_erased, labels))
    return [*(f"{each:.2f}" for each in found), f"{null[4]:.2f} to {null[-5]:.2f}"]


if __name__ == "__main__":
    main()
