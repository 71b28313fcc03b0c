"""Passes of a model through the forward path, and through the bridge as it is."""

import torch

from refusal_mi.model.running import all_logits, running
from refusal_mi.text.chat import ChatFormat

from .naive import ASKS


def batch_of(model):
    return ChatFormat(model.tokenizer).batch(ASKS[:3])


def logits(model, batch, hooks=(), **options):
    with torch.no_grad(), running(model, hooks, **options):
        return all_logits(model, batch)[batch.mask.bool()]


def bridge(model, batch, hooks=()):
    return logits(model, batch, hooks, keep_wrappers=True)


def structure(model):
    """Every module by name, with the hooks that are on it and a forward of its own."""
    with torch.no_grad():  # TransformerLens and transformers put their own hooks on in the first pass
        model(torch.tensor([[0, 1]]), use_cache=False)
    roots = {"bridge": model, "hf": model.original_model}
    return {
        (root, name): (id(each), tuple(each._forward_hooks), tuple(each._forward_pre_hooks), "forward" in vars(each))
        for root, top in roots.items()
        for name, each in top.named_modules(remove_duplicate=False)
    }
