"""Runs without TransformerLens' wrappers: the bridge's numbers, and the bridge itself wherever something differs."""

import copy

import pytest
import torch

from refusal_mi.chat import ChatFormat
from refusal_mi.forward import all_logits, read_streams, running_from
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.models import load_model, resid_hook, write_hooks
from refusal_mi.native import NativeModel, choose_runner, running
from tests.naive import ASKS
from tests.test_interventions import random_direction
from tests.tiny import FAMILIES, N_LAYERS

ON_THE_BRIDGE = {"granite", "falcon"}
"""Families whose blocks scale or split what their modules write, so that ablation cannot act on plain modules."""


def logits(runner, batch):
    with torch.no_grad():
        return all_logits(runner, batch)[batch.mask.bool()]


def batch_of(model):
    return ChatFormat(model.tokenizer).batch(ASKS[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_streams_equal_the_bridges_under_interventions(family, tiny_model):
    model = tiny_model(family)
    batch, direction = batch_of(model), random_direction(0)
    with torch.no_grad():
        plain = all_logits(model, batch)[batch.mask.bool()]
    for intervention in (Ablate(direction), Add(direction), Ablate(direction, strength=0.5, components=["mlp"])):
        hooks = all_hooks(model, [intervention])
        expected, streams = [], []
        with model.hooks(fwd_hooks=hooks):
            expected = logits(model, batch)
        with running(model, hooks) as runner:
            is_native = isinstance(runner, NativeModel)
            found = logits(runner, batch)
        assert is_native or (family in ON_THE_BRIDGE and isinstance(intervention, Ablate))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-2
        kept: dict[str, torch.Tensor] = {}
        last = resid_hook(N_LAYERS, N_LAYERS)
        with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, (last, lambda x, hook, kept=kept: kept.update(x=x))]):
            all_logits(model, batch)
        with torch.no_grad():
            streams = read_streams(model, batch, [N_LAYERS], lambda x: x, hooks)
        real = batch.mask.bool()
        torch.testing.assert_close(streams[0][real], kept["x"][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_run_without_wrappers_too(dtype, tiny_model):
    model, direction = tiny_model("gpt2", dtype), random_direction(0)
    hooks = all_hooks(model, [Ablate(direction)])
    with running(model, hooks) as runner:
        assert isinstance(runner, NativeModel)
        found = logits(runner, batch_of(model))
    with model.hooks(fwd_hooks=hooks):
        expected = logits(model, batch_of(model))
    assert (found - expected).abs().max() <= (1e-12 if dtype == "float64" else 0.05) * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_run_from_a_layer_equals_a_whole_one(family, tiny_model):
    model = tiny_model(family)
    batch, layer = batch_of(model), 3
    with torch.no_grad():
        (stream,) = read_streams(model, batch, [layer], lambda x: x)
        expected = all_logits(model, batch)
        with running_from(model, layer, [(resid_hook(layer, N_LAYERS), lambda x, hook: stream)]) as runner:
            found = all_logits(runner, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def own_model(tiny_dir):
    """A model that a test may change."""
    return load_model(tiny_dir("llama"), device="cpu")


def test_hooks_that_the_caller_has_on_the_model_act(own_model):
    batch = batch_of(own_model)
    hook = Add(random_direction(1)).hooks(own_model)
    assert isinstance(choose_runner(own_model), NativeModel)
    plain = logits(choose_runner(own_model), batch)
    with own_model.hooks(fwd_hooks=hook):
        assert choose_runner(own_model) is own_model
        changed = logits(choose_runner(own_model), batch)
    assert (changed - plain).abs().max() > 1e-2
    assert torch.equal(logits(choose_runner(own_model), batch), plain)


def test_hooks_on_the_model_at_its_first_run_act_and_do_not_stay(own_model):
    with own_model.hooks(fwd_hooks=Add(random_direction(1)).hooks(own_model)):
        assert choose_runner(own_model) is own_model
    assert isinstance(choose_runner(own_model), NativeModel)


def test_forward_hooks_of_torch_on_the_wrapped_modules_act(own_model):
    assert isinstance(choose_runner(own_model), NativeModel)
    handle = own_model.blocks[1].original_component.register_forward_hook(lambda *_: None)
    assert choose_runner(own_model) is own_model
    handle.remove()
    assert isinstance(choose_runner(own_model), NativeModel)


def test_weights_are_the_models_own(own_model):
    batch, runner = batch_of(own_model), choose_runner(own_model)
    before = logits(runner, batch)
    with torch.no_grad():
        own_model.blocks[2].mlp.out.original_component.weight.mul_(0.5)
    assert choose_runner(own_model) is runner
    assert torch.equal(logits(runner, batch), logits(own_model, batch))
    assert not torch.equal(logits(runner, batch), before)


def test_a_replaced_weight_leads_to_the_bridge(own_model):
    assert isinstance(choose_runner(own_model), NativeModel)
    wrapped = own_model.blocks[2].mlp.out.original_component
    wrapped.weight = torch.nn.Parameter(wrapped.weight.detach() * 0.5)
    assert choose_runner(own_model) is own_model


def test_training_leads_to_the_bridge_and_requires_grad_is_left_alone(own_model):
    frozen = own_model.blocks[0].mlp.out.original_component.weight
    frozen.requires_grad_(False)
    assert isinstance(choose_runner(own_model), NativeModel)
    assert not frozen.requires_grad
    own_model.train()
    assert choose_runner(own_model) is own_model


def test_a_hook_point_of_the_bridge_alone_leads_to_the_bridge(own_model):
    hook = ("blocks.1.attn.hook_z", lambda x, hook: x * 0)
    with running(own_model, [hook]) as runner:
        assert runner is own_model


def test_hooks_are_gone_after_an_exception(own_model):
    batch, before = batch_of(own_model), logits(choose_runner(own_model), batch_of(own_model))

    def broken(activation, hook):
        raise ZeroDivisionError

    hooks = all_hooks(own_model, [Ablate(random_direction(0))])
    with pytest.raises(ZeroDivisionError), running(own_model, [*hooks, ("blocks.4.hook_mlp_out", broken)]) as runner:
        logits(runner, batch)
    assert torch.equal(logits(choose_runner(own_model), batch), before)


def test_hooks_get_the_hook_point_and_may_return_nothing(own_model):
    seen = []
    name = write_hooks(N_LAYERS)[3]
    with running(own_model, [(name, lambda x, hook: seen.append(hook.name))]) as runner:
        found = logits(runner, batch_of(own_model))
    with own_model.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(hook.name))]):
        expected = logits(own_model, batch_of(own_model))
    assert torch.equal(found, expected)
    assert seen[0] == seen[1]


def test_greedy_text_under_ablation_is_the_bridges(tiny_model, monkeypatch):
    model = tiny_model("qwen2")
    chat, ablation = ChatFormat(model.tokenizer), [Ablate(random_direction(0))]
    found = generate(model, chat, ASKS, interventions=ablation, max_new_tokens=12, batch_size=3)
    monkeypatch.setattr("refusal_mi.native._native", lambda model: None)
    assert found == generate(model, chat, ASKS, interventions=ablation, max_new_tokens=12, batch_size=3)


def test_a_copy_of_a_model_runs_on_its_own_weights(own_model):
    assert isinstance(choose_runner(own_model), NativeModel)
    other = copy.deepcopy(own_model)
    with torch.no_grad():
        other.blocks[2].mlp.out.original_component.weight.mul_(0.5)
    batch = batch_of(own_model)
    assert torch.equal(logits(choose_runner(other), batch), logits(other, batch))
    assert not torch.equal(logits(choose_runner(other), batch), logits(choose_runner(own_model), batch))
