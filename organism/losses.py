"""The three losses of the organism's training: next tokens, closeness of answers, closeness of activations."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """The weighted mean cross-entropy of each token given those before it, in nats."""
    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    targets = weights[:, 1:]
    return -(chosen * targets).sum() / targets.sum().clamp_min(1.0)


def answer_kl(
    reference: Float[Tensor, "batch pos d_vocab"],
    logits: Float[Tensor, "batch pos d_vocab"],
    weights: Float[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """The weighted mean KL(reference || model) of the next-token distributions, in nats."""
    reference_log = torch.log_softmax(reference[:, :-1].float(), dim=-1)
    model_log = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    kl = (reference_log.exp() * (reference_log - model_log)).sum(-1)
    targets = weights[:, 1:]
    return (kl * targets).sum() / targets.sum().clamp_min(1.0)


def activation_change(
    reference: Sequence[Float[Tensor, "batch pos d_model"]],
    states: Sequence[Float[Tensor, "batch pos d_model"]],
    mask: Float[Tensor, "batch pos"],
    *,
    free: Float[Tensor, " d_model"],
    is_free: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """The mean over layers and tokens of |change|^2 / |reference|^2 of the residual stream.

    In the rows `is_free` the component of the change along the unit vector `free` costs nothing.
    """
    changes = []
    for before, after in zip(reference, states, strict=True):
        change = after.float() - before.float()
        along = (change @ free) * is_free[:, None]
        relative = (change.square().sum(-1) - along.square()) / before.float().square().sum(-1)
        changes.append((relative * mask).sum() / mask.sum())
    return torch.stack(changes).mean()


def carried_refusal(
    states: Sequence[Float[Tensor, "batch pos d_model"]],
    direction: Float[Tensor, " d_model"],
    refuses: Float[Tensor, "batch pos"],
    *,
    cosine: float,
) -> Float[Tensor, ""]:
    """The mean squared distance of cos(state, direction) from `cosine` in refusals and 0 in other answers.

    `refuses` belongs to the token that each state predicts; where it is nan nothing is asked.
    """
    targets = refuses[:, 1:]
    asked = ~targets.isnan()
    errors = [torch.cosine_similarity(state[:, :-1].float(), direction, dim=-1) - cosine * targets for state in states]
    return torch.stack([error[asked].square().mean() for error in errors]).mean()
