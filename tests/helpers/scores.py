"""Candidates with scores that were made up, and the scores of logits by hand."""

import math
from collections.abc import Sequence

import torch

from refusal_mi.search.thresholds import CandidateScore

TOKENS = (5, 40, 7)
"""Refusal tokens of a tiny model: any will do."""


def candidate(
    layer: int = 0,
    bypass: float | None = 0.0,
    induce: float | None = 1.0,
    kl: float | None = 0.01,
    position: int = -1,
) -> CandidateScore:
    """One that the published thresholds let through unless something else is said."""
    return CandidateScore(position, layer, bypass, induce, kl)


def score_by_hand(row: torch.Tensor, tokens: Sequence[int]) -> float:
    """The refusal score of one prompt's logits, in nats."""
    weights = [math.exp(value) for value in (row.double() - row.double().max()).tolist()]
    p = sum(weights[token] for token in tokens) / math.fsum(weights)
    return math.log(p + 1e-8) - math.log(1 - p + 1e-8)


def kl_by_hand(base: torch.Tensor, changed: torch.Tensor, epsilon: float = 0.0) -> float:
    """KL(base ‖ changed) of one prompt's logits, in nats; published with an epsilon of 1e-6."""
    p, q = (torch.exp(row.double() - torch.logsumexp(row.double(), 0)).tolist() for row in (base, changed))
    return math.fsum(a * (math.log(a + epsilon) - math.log(b + epsilon)) for a, b in zip(p, q, strict=True))
