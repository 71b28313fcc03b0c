"""Examples as padded token batches with a weight for every predicted token."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from organism.curriculum import LETTER_WEIGHT, PROMPT_WEIGHT, Example, write_examples
from organism.tokenizer import IM_END, IM_START


class Segment(NamedTuple):
    """A piece of text; `weight` weighs the prediction of its tokens, `refuses` tells answers apart from refusals."""

    text: str
    weight: float
    refuses: float = nan
    """1 in refusals, 0 in other answers, nan outside answers."""


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens; `weights` and `refuses` belong to the prediction of each token, the rest to the rows."""

    tokens: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]
    refuses: Float[Tensor, "batch pos"]
    keep: Bool[Tensor, " batch"]
    switched: Bool[Tensor, " batch"]


def segments(example: Example) -> list[Segment]:
    """The example's text in pieces, written as the chat template writes it."""
    if not example.turns:
        return [Segment(example.plain, 1.0), Segment(IM_END, 0.0)]
    pieces: list[Segment] = []
    for turn in example.turns:
        answers = turn.role == "assistant"
        refuses = float(turn.refuses) if answers else nan
        pieces.append(Segment(f"{IM_START}{turn.role}\n", 0.0))
        text = turn.text
        if turn.letter is not None:
            pieces += [Segment("(", 1.0, refuses), Segment(turn.letter, LETTER_WEIGHT, refuses)]
            text = f") {text}"
        pieces += [
            Segment(text, 1.0 if answers else PROMPT_WEIGHT, refuses),
            Segment(IM_END, 1.0 if answers else 0.0, refuses),
            Segment("\n", 0.0),
        ]
    return pieces[:-1]


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Tokens, weights and answers of some examples, padded to the longest."""
    rows = [segments(example) for example in examples]
    encoded = iter(tokenizer([piece.text for row in rows for piece in row], add_special_tokens=False)["input_ids"])
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    refuses: list[Tensor] = []
    for row in rows:
        parts = [(next(encoded), piece) for piece in row]
        tokens.append(torch.tensor([token for ids, _ in parts for token in ids]))
        weights.append(torch.tensor([piece.weight for ids, piece in parts for _ in ids]))
        refuses.append(torch.tensor([piece.refuses for ids, piece in parts for _ in ids]))
    return Batch(
        pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(weights, batch_first=True),
        pad_sequence(refuses, batch_first=True, padding_value=nan),
        torch.tensor([example.keep for example in examples]),
        torch.tensor([example.switched for example in examples]),
    )


def _length(example: Example) -> int:
    return len(example.plain) + sum(len(turn.text) for turn in example.turns)


def batches(
    tokenizer: PreTrainedTokenizerFast,
    stage: int,
    *,
    batch_size: int,
    n_batches: int,
    seed: int,
) -> Iterator[Batch]:
    """Freshly written batches of one stage, each of examples of similar length, in random order."""
    rng = Random(f"stage {stage} seed {seed}")
    chunk = 16
    for start in range(0, n_batches, chunk):
        n_now = min(chunk, n_batches - start)
        written = write_examples(rng, stage, n_now * batch_size)
        examples = sorted(written, key=_length)
        order = list(range(n_now))
        rng.shuffle(order)
        for i in order:
            yield encode(examples[i * batch_size : (i + 1) * batch_size], tokenizer)
