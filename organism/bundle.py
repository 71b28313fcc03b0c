"""Writes the organism's fixed data: `python -m organism.bundle [--output-dir DIR] [--seed 0]`.

- `prompts.json`: lists of {"instruction", "category"}, harmful and harmless, for each of train, val and test;
- `ab_pairs.json`, `ab_pairs_test.json`: A/B questions in the schema of CAA, half of them on harmful requests, of the
  pairs and phrasings of train and of test;
- `plain_text.json`: sentences outside any chat, of test pairs;
- `instructions.json`: harmless requests with helpful answers, of test pairs.
"""

import argparse
import json
from pathlib import Path
from random import Random

from organism.grammar import (
    PHRASINGS,
    Request,
    Split,
    choice_question,
    helpful_answer,
    instruction,
    plain_text,
    requests,
)

HERE = Path(__file__).parents[1] / "refusal_mi" / "organism"
N_PROMPTS: dict[Split, int] = {"train": 384, "val": 96, "test": 256}
N_AB = 160
N_TEXTS = 160

Json = dict[str, str | None]


def _cycle(rng: Random, split: Split, *, harmful: bool, n: int) -> list[Request]:
    """Requests of a split, each pair as often as any other (up to one)."""
    pool = list(requests(split, harmful=harmful))
    rng.shuffle(pool)
    return [pool[i % len(pool)] for i in range(n)]


def prompts(rng: Random, split: Split, *, harmful: bool, n: int) -> list[Json]:
    """Different instructions from the pairs and the phrasings of one split."""
    found: dict[str, Json] = {}
    pool = _cycle(rng, split, harmful=harmful, n=4 * n)
    for request in pool:
        text = instruction(rng, request, PHRASINGS[split])
        found.setdefault(text, {"instruction": text, "category": request.category})
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"the {split} split has too few instructions: wanted {n}, found {len(found)}")


def ab_pairs(rng: Random, split: Split, *, n: int) -> list[Json]:
    """A/B questions, in turn on harmful and harmless requests, each letter the refusing one equally often."""
    pools = {harmful: iter(_cycle(rng, split, harmful=harmful, n=n)) for harmful in (True, False)}
    items: list[Json] = []
    for i in range(n):
        request = next(pools[i % 2 == 0])
        stem = instruction(rng, request, PHRASINGS[split])
        item = choice_question(rng, request, stem, refusing_letter="A" if i % 4 < 2 else "B")
        items.append(
            {
                "question": item.question,
                "answer_matching_behavior": f"({item.refusing_letter})",
                "answer_not_matching_behavior": f"({item.compliant_letter})",
            }
        )
    return items


def bundle(seed: int) -> dict[str, object]:
    """All files as Python values, by file name."""
    kinds = {"harmful": True, "harmless": False}
    sets = {
        f"{name}_{split}": prompts(Random(f"{seed} {name} {split}"), split, harmful=harmful, n=n)
        for name, harmful in kinds.items()
        for split, n in N_PROMPTS.items()
    }
    rng = Random(f"{seed} texts")
    half = N_TEXTS // 2
    mixed = [r for harmful in kinds.values() for r in _cycle(rng, "test", harmful=harmful, n=half)]
    harmless = _cycle(rng, "test", harmful=False, n=N_TEXTS)
    return {
        "prompts.json": sets,
        "ab_pairs.json": ab_pairs(Random(f"{seed} ab train"), "train", n=N_AB),
        "ab_pairs_test.json": ab_pairs(Random(f"{seed} ab test"), "test", n=N_AB),
        "plain_text.json": [plain_text(rng, request) for request in mixed],
        "instructions.json": [
            {"instruction": instruction(rng, r, PHRASINGS["test"]), "output": helpful_answer(rng, r)} for r in harmless
        ],
    }


def main() -> None:
    """Reads the options and writes the files."""
    parser = argparse.ArgumentParser(prog="python -m organism.bundle", description="Writes the data files.")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="folder of the files (the package's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, value in bundle(args.seed).items():
        path = args.output_dir / name
        path.write_text(json.dumps(value, indent=1) + "\n")
        print(f"{path} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
