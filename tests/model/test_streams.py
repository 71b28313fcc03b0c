"""Streams of a pass, passes that begin at a layer, and last blocks that run on last positions alone."""

import pytest
import torch

from refusal_mi.interventions import Add
from refusal_mi.model.points import resid_hook
from refusal_mi.model.running import (
    LastPositions,
    all_logits,
    last_logits,
    n_block_outputs,
    residuals,
    running,
    running_from,
)
from refusal_mi.reading import mean_activations
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import FAMILIES, N_LAYERS
from tests.helpers.naive import ASKS
from tests.helpers.passes import batch_of, logits, structure
from tests.helpers.tiers import first_is_fast


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_run_from_a_layer_equals_a_whole_one(family, tiny_model):
    model = tiny_model(family)
    batch, layer, before = batch_of(model), 3, structure(model)
    (stream,) = residuals(model, batch, [layer], batch.tokens.shape[1])
    expected = logits(model, batch)
    restart = [(resid_hook(layer, N_LAYERS), lambda x, hook: stream)]
    with torch.no_grad(), running_from(model, layer, restart, n_block_outputs(model)):
        found = all_logits(model, batch)[batch.mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert structure(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "olmo2", "falcon"])
@pytest.mark.parametrize("layers", [range(N_LAYERS), [2], [0], [1, N_LAYERS]])
def test_streams_equal_those_of_a_whole_pass(family, layers, tiny_model):
    model = tiny_model(family)
    batch, kept = batch_of(model), {}
    names = [resid_hook(layer, N_LAYERS) for layer in layers]
    hooks = [(name, lambda x, hook, name=name: kept.update({name: x[:, -3:]})) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        all_logits(model, batch)
    narrow = LastPositions(model, max(layers) - 1, 3) if max(layers) else None
    for _ in range(2):  # the first pass compares, the second leaves positions out
        found = residuals(model, batch, layers, 3, narrow=narrow)
        torch.testing.assert_close(found, [kept[name] for name in names], rtol=1e-5, atol=1e-5)


def test_streams_show_a_hook_on_the_last_layer_that_is_read(tiny_model):
    model, direction = tiny_model("llama"), random_direction(2, layer=3)
    batch = batch_of(model)
    plain = residuals(model, batch, [2, 3], 2)
    with model.hooks(fwd_hooks=Add(direction).hooks(model)):
        changed = residuals(model, batch, [2, 3], 2)
    added = residuals(model, batch, [2, 3], 2, hooks=Add(direction).hooks(model))
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[1], added[1])
    torch.testing.assert_close(changed[1] - plain[1], direction.vector.expand(3, 2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_last_logits_do_not_need_the_last_block_elsewhere(family, tiny_model):
    model = tiny_model(family)
    batch, last = batch_of(model), LastPositions(model, -1, 1)
    with torch.no_grad():
        expected, whole = last_logits(model, batch), all_logits(model, batch)
        with running(model):
            with last.narrowed():
                assert torch.equal(all_logits(model, batch), whole)  # the first pass compares
            is_block = last.is_used
            with last.narrowed():
                assert ((all_logits(model, batch)[:, -2] - whole[:, -2]).abs().max() > 1e-3) == is_block
                torch.testing.assert_close(last_logits(model, batch), expected, rtol=1e-5, atol=1e-5)
        looking = model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)])
        with looking, running(model), last.narrowed():  # the caller's hook would see zeros
            assert torch.equal(all_logits(model, batch), whole)
    assert is_block == (family not in {"phi3", "falcon"})  # whose bridges run something else


class Mixing(torch.nn.Module):
    """An MLP that adds what was computed at the position before."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, stream):
        out = self.mlp(stream)
        return out + torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]


def test_modules_that_mix_positions_are_left_whole(own_model):
    chat, wrapper = ChatFormat(own_model.tokenizer), own_model.blocks[N_LAYERS - 2].mlp
    wrapper._modules["_original_component"] = Mixing(wrapper.original_component).eval()
    last = LastPositions(own_model, N_LAYERS - 2, 5)
    asks = ASKS * 2
    found = mean_activations(own_model, chat, asks, batch_size=2).means
    with own_model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)]):
        expected = mean_activations(own_model, chat, asks, batch_size=2).means
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    residuals(own_model, batch_of(own_model), [N_LAYERS - 1], 5, narrow=last)
    assert not last.is_used
