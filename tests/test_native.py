"""Runs without TransformerLens' wrappers: the bridge's numbers, and the bridge itself wherever something differs."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from refusal_mi.activations import mean_activations
from refusal_mi.chat import ChatFormat
from refusal_mi.forward import (
    all_logits,
    at_last_positions,
    cached_residuals,
    last_logits,
    read_streams,
    running_from,
)
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.models import load_model, resid_hook, write_hooks
from refusal_mi.native import NativeModel, choose_runner, running, without_grad
from refusal_mi.tokens import TokenBatch
from tests.naive import ASKS
from tests.test_interventions import random_direction
from tests.tiny import D_MODEL, FAMILIES, N_LAYERS, save_tiny, tiny_tokenizer

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
    for _ in range(2):
        handle = own_model.blocks[1].original_component.register_forward_hook(lambda *_: None)
        assert choose_runner(own_model) is own_model
        handle.remove()
        assert isinstance(choose_runner(own_model), NativeModel)


def test_forward_hooks_of_torch_from_before_the_first_run_act(own_model):
    handle = own_model.blocks[1].original_component.register_forward_hook(lambda *_: None)
    assert choose_runner(own_model) is own_model
    handle.remove()
    assert isinstance(choose_runner(own_model), NativeModel)


def test_a_hook_that_takes_the_place_of_another_is_noticed(own_model):
    block = own_model.blocks[1].original_component
    known = choose_runner(own_model)
    block._forward_hooks.clear()
    block.register_forward_hook(lambda *_: None)
    assert choose_runner(own_model) is own_model is not known


def test_a_patched_forward_and_backward_hooks_lead_to_the_bridge(own_model):
    assert isinstance(choose_runner(own_model), NativeModel)
    module = own_model.blocks[1].mlp.original_component
    module.forward = lambda x: x
    assert choose_runner(own_model) is own_model
    del module.forward
    assert isinstance(choose_runner(own_model), NativeModel)
    own_model.add_hook("blocks.1.hook_resid_pre", lambda grad, hook: None, dir="bwd")
    assert choose_runner(own_model) is own_model


def test_weights_are_the_models_own(own_model):
    batch, runner = batch_of(own_model), choose_runner(own_model)
    before = logits(runner, batch)
    with torch.no_grad():
        own_model.blocks[2].mlp.out.original_component.weight.mul_(0.5)
    assert choose_runner(own_model) is runner
    assert torch.equal(logits(runner, batch), logits(own_model, batch))
    assert not torch.equal(logits(runner, batch), before)


def test_replaced_weights_are_used_and_the_old_ones_let_go(own_model):
    batch, wrapped = batch_of(own_model), own_model.blocks[2].mlp.out.original_component
    before = logits(choose_runner(own_model), batch)
    old = weakref.ref(wrapped.weight)
    wrapped.weight = torch.nn.Parameter(wrapped.weight.detach() * 0.5)
    runner = choose_runner(own_model)
    assert isinstance(runner, NativeModel)
    assert torch.equal(logits(runner, batch), logits(own_model, batch))
    assert not torch.equal(logits(runner, batch), before)
    gc.collect()
    assert old() is None


def test_a_cast_a_new_buffer_and_a_new_setting_are_followed(own_model):
    batch = batch_of(own_model)
    assert isinstance(choose_runner(own_model), NativeModel)
    own_model.to(torch.bfloat16)
    torch.testing.assert_close(logits(choose_runner(own_model), batch), logits(own_model, batch), rtol=1e-2, atol=1e-2)
    own_model.to(torch.float32)
    rotary = own_model.original_model.model.rotary_emb
    rotary = getattr(rotary, "original_component", rotary)
    before = logits(choose_runner(own_model), batch)
    rotary.inv_freq = rotary.inv_freq * 0.5
    assert (logits(own_model, batch) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(choose_runner(own_model), batch), logits(own_model, batch), rtol=1e-5, atol=1e-5)
    runner = choose_runner(own_model)
    own_model.original_model.config.some_setting = 1
    assert choose_runner(own_model) is not runner


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
    monkeypatch.setattr("refusal_mi.native.native_model", lambda model: None)
    assert found == generate(model, chat, ASKS, interventions=ablation, max_new_tokens=12, batch_size=3)


def test_a_copy_of_a_model_runs_on_its_own_weights(own_model):
    assert isinstance(choose_runner(own_model), NativeModel)
    other = copy.deepcopy(own_model)
    with torch.no_grad():
        other.blocks[2].mlp.out.original_component.weight.mul_(0.5)
    batch = batch_of(own_model)
    assert torch.equal(logits(choose_runner(other), batch), logits(other, batch))
    assert not torch.equal(logits(choose_runner(other), batch), logits(choose_runner(own_model), batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "olmo2", "falcon"])
@pytest.mark.parametrize("layers", [range(N_LAYERS), [2], [0], [1, N_LAYERS]])
def test_cached_streams_equal_those_of_a_whole_pass(family, layers, tiny_model):
    model = tiny_model(family)
    batch, kept = batch_of(model), {}
    names = [resid_hook(layer, N_LAYERS) for layer in layers]
    hooks = [(name, lambda x, hook, name=name: kept.update({name: x[:, -3:]})) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        all_logits(model, batch)
    with torch.no_grad():
        found = cached_residuals(model, batch, layers, 3)
    torch.testing.assert_close(found, torch.stack([kept[name] for name in names], dim=2), rtol=1e-5, atol=1e-5)


def test_cached_streams_show_a_hook_on_the_last_layer_that_is_read(tiny_model):
    model, direction = tiny_model("llama"), random_direction(2, layer=3)
    batch = batch_of(model)
    with torch.no_grad():
        plain = cached_residuals(model, batch, [2, 3], 2)
        with model.hooks(fwd_hooks=Add(direction).hooks(model)):
            changed = cached_residuals(model, batch, [2, 3], 2)
    assert torch.equal(changed[:, :, 0], plain[:, :, 0])
    torch.testing.assert_close(changed[:, :, 1] - plain[:, :, 1], direction.vector.expand(3, 2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_logits_do_not_need_the_last_block_elsewhere(family, tiny_model):
    model = tiny_model(family)
    batch = batch_of(model)
    with torch.no_grad():
        expected = last_logits(model, batch)
        whole = all_logits(model, batch)
        for runner in (model, choose_runner(model)):
            with at_last_positions(runner, -1, 1):
                assert (all_logits(runner, batch)[:, -2] - whole[:, -2]).abs().max() > 1e-3
                torch.testing.assert_close(last_logits(runner, batch), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last_logits(runner, batch), expected, rtol=1e-5, atol=1e-5)


def test_what_a_hook_of_the_caller_keeps_can_be_differentiated_through(own_model):
    chat, kept = ChatFormat(own_model.tokenizer), []
    with without_grad(own_model):
        assert torch.ones(1).is_inference()
    own_model.add_hook("blocks.2.hook_resid_pre", lambda stream, hook: kept.append(stream))
    mean_activations(own_model, chat, ASKS[:2])
    probe = torch.ones(D_MODEL, requires_grad=True)
    (kept[0] @ probe).sum().backward()
    assert probe.grad is not None and probe.grad.abs().sum() > 0


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "dynamic": {"factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_depend_on_the_length_are_the_bridges(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **ROPES[kind]}
    changes = {"original_max_position_embeddings": 64} if kind == "longrope" else {}
    save_tiny("phi3" if changes else "llama", tmp_path, rope_parameters=rope, **changes)
    model = load_model(tmp_path, device="cpu")
    assert isinstance(choose_runner(model), NativeModel) == (kind == "longrope")
    for length in (20, 100, 20):
        tokens = torch.arange(2 * length).reshape(2, length) % 200
        batch = TokenBatch(tokens, torch.ones_like(tokens))
        torch.testing.assert_close(logits(choose_runner(model), batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "narrows", "shape"),
    [
        (
            "opt",
            False,
            {"ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": D_MODEL},
        ),
        ("bloom", False, {"n_layer": 3, "n_head": 4}),
        (
            "qwen2",
            True,
            {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
    ],
)
def test_families_whose_modules_need_whole_streams_get_them(family, narrows, shape, tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), hidden_size=D_MODEL, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    chat = ChatFormat(model.tokenizer)
    assert getattr(choose_runner(model), "narrows", False) == narrows
    batch, n_positions = batch_of(model), len(chat.positions)
    with torch.no_grad():
        streams = read_streams(model, batch, range(3), lambda stream: stream[:, -n_positions:].double().mean(0))
    found = mean_activations(model, chat, ASKS[:3]).means
    torch.testing.assert_close(found, torch.stack(streams, dim=1), rtol=1e-5, atol=1e-6)
