"""Texts for fits of directions to tiny models: their prompts with made-up answers of different lengths."""

from typing import Any

import torch

from refusal_mi.estimators.rdo import RDOTexts
from refusal_mi.text.batches import Span

from .naive import ASKS, CHATS, prompt_ids


def answered(tokenizer: Any, instructions: tuple[str, ...], seed: int, n_ids: int = 250) -> tuple[Span, ...]:
    """Each with 2, 3, 4, ... random tokens."""
    generator, spans = torch.Generator().manual_seed(seed), []
    for n, text in enumerate(instructions, start=2):
        prompt = prompt_ids(tokenizer, text)
        answer = torch.randint(n_ids, (n,), generator=generator).tolist()
        spans.append(Span((*prompt, *answer), len(prompt), len(prompt) + n))
    return tuple(spans)


def made_up_texts(tokenizer: Any) -> RDOTexts:
    """Of each kind as many as there are instructions."""
    return RDOTexts(answered(tokenizer, ASKS, 0), answered(tokenizer, CHATS, 1), answered(tokenizer, CHATS, 2))
