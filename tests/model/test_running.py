"""The one forward path: bit for bit what the bridge gives, whatever was changed in the model or put on it."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.model import wrappers
from refusal_mi.model.loading import load_model
from refusal_mi.model.points import resid_hook, write_hooks
from refusal_mi.model.running import (
    LastPositions,
    is_untouched,
    residuals,
    running,
)
from refusal_mi.reading import mean_activations
from refusal_mi.text.batches import TokenBatch
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import D_MODEL, FAMILIES, N_LAYERS, save_tiny, tiny_tokenizer
from tests.helpers.naive import ASKS
from tests.helpers.passes import batch_of, bridge, logits, structure
from tests.helpers.tiers import first_is_fast

WITHOUT_ATTENTION_WRAPPERS = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"),
    *("gpt_oss", "cohere"),
}
"""Families in which whole attention modules run without their wrapper."""


def left_out(model):
    """Kinds of the wrappers that a pass begun now would leave out."""
    found = wrappers.what_to_leave_out(model, [])
    return set() if found is None else {type(each.wrapper).__name__ for each in found.wrappers}


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_every_number_is_the_bridges_bit_for_bit(family, tiny_model):
    model = tiny_model(family)
    batch, direction, before = batch_of(model), random_direction(0), structure(model)
    plain = bridge(model, batch)
    assert torch.equal(logits(model, batch), plain)
    for intervention in (Ablate(direction), Add(direction), Ablate(direction, strength=0.5, components=["mlp"])):
        hooks = all_hooks(model, [intervention])
        expected = bridge(model, batch, hooks)
        assert torch.equal(logits(model, batch, hooks), expected)
        assert (expected - plain).abs().max() > 1e-2
    assert structure(model) == before
    assert any("Attention" in kind for kind in left_out(model)) == (family in WITHOUT_ATTENTION_WRAPPERS)


def test_blocks_lose_their_wrappers_but_where_a_stream_is_hooked_or_read(own_model):
    def out(hooks, **options):
        found = wrappers.what_to_leave_out(own_model, hooks, **options).wrappers
        return [each.wrapper for each in found if type(each.wrapper).__name__ == "BlockBridge"]

    ablation = all_hooks(own_model, [Ablate(random_direction(0), components=["attn", "mlp"])])
    addition = all_hooks(own_model, [Add(random_direction(0), layer=3)])
    blocks = list(own_model.blocks)
    assert out(ablation) == blocks
    assert out([*ablation, *addition]) == [*blocks[:3], *blocks[4:]]
    assert out(all_hooks(own_model, [Ablate(random_direction(0))])) == blocks[1:]  # the first one reads the embedding
    assert out(ablation, keep_blocks=True) == []
    with running(own_model, ablation):
        assert list(own_model.blocks) == [block.original_component for block in blocks]
        streams = residuals(own_model, batch_of(own_model), [2], 1)
    assert list(own_model.blocks) == blocks
    with running(own_model, ablation, keep_wrappers=True):
        expected = residuals(own_model, batch_of(own_model), [2], 1)
    assert torch.equal(streams[0], expected[0])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_too(dtype, tiny_model):
    model = tiny_model("llama", dtype)
    batch = ChatFormat(model.tokenizer).batch(ASKS[:1])  # alone: eager attention in float64 cannot mask padding
    hooks = all_hooks(model, [Ablate(random_direction(0))])
    assert torch.equal(logits(model, batch, hooks), bridge(model, batch, hooks))


def test_hooks_that_the_caller_has_on_the_model_act(own_model):
    batch, plain = batch_of(own_model), logits(own_model, batch_of(own_model))
    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.ln1.hook_normalized", "blocks.0.mlp.hook_out"]
    for name in names:
        with own_model.hooks(fwd_hooks=[(name, lambda x, hook: x * 1.5)]):
            assert not is_untouched(own_model)
            assert (logits(own_model, batch) - plain).abs().max() > 1e-3
        assert torch.equal(logits(own_model, batch), plain)


def test_torch_hooks_act_and_lead_to_the_bridge(own_model):
    batch, plain = batch_of(own_model), logits(own_model, batch_of(own_model))
    hf = own_model.original_model
    for target in (hf, hf.model, own_model.blocks[1].original_component, own_model.blocks[1].mlp, own_model):
        handle = target.register_forward_hook(lambda *_: None)
        assert not is_untouched(own_model)
        handle.remove()
        assert is_untouched(own_model)
    double = own_model.blocks[1].mlp.out.original_component.register_forward_hook(lambda _, __, out: out * 2)
    assert torch.equal(logits(own_model, batch), bridge(own_model, batch))
    assert (logits(own_model, batch) - plain).abs().max() > 1e-3
    double.remove()


def test_a_patched_forward_backward_hooks_and_training_lead_to_the_bridge(own_model):
    patched = own_model.blocks[1].mlp.original_component
    patched.forward = lambda x: x
    assert not is_untouched(own_model)
    del patched.forward
    assert is_untouched(own_model)
    own_model.train()
    assert not is_untouched(own_model)
    own_model.eval()
    own_model.add_hook("blocks.1.hook_resid_pre", lambda grad, hook: None, dir="bwd")
    assert not is_untouched(own_model)


def test_modes_that_the_plain_modules_do_not_have_keep_their_wrappers(own_model):
    assert "PositionEmbeddingsAttentionBridge" in left_out(own_model)
    own_model.set_use_attn_result(True)
    assert "PositionEmbeddingsAttentionBridge" not in left_out(own_model)
    own_model.set_use_attn_result(False)
    own_model.original_model.config._attn_implementation = "sdpa"
    assert "PositionEmbeddingsAttentionBridge" not in left_out(own_model)


def test_hooks_of_somebody_else_run_on_a_whole_model(own_model):
    """Such a hook may start a pass, or look at the model: it finds what it would find without this package."""
    batch, inner, seen = batch_of(own_model), {}, []
    whole = structure(own_model)

    def curious(stream, hook):
        if not seen:
            seen.append(hook.name)
            inner["structure"] = {key: value[0] for key, value in structure(own_model).items()}
            _, inner["cache"] = own_model.run_with_cache(batch.tokens, names_filter=["blocks.3.attn.hook_z"])
            inner["logits"] = logits(own_model, batch)
        return stream * 1.5

    name = resid_hook(2, N_LAYERS)
    own = all_hooks(own_model, [Ablate(random_direction(0))])
    expected = logits(own_model, batch, [*own, (name, lambda stream, hook: stream * 1.5)])
    found = logits(own_model, batch, [*own, (name, curious)])
    assert torch.equal(found, expected)
    assert inner["structure"] == {key: value[0] for key, value in whole.items()}
    assert "blocks.3.attn.hook_z" in inner["cache"]
    assert torch.equal(inner["logits"], expected)  # the outer pass's hooks, curious itself included, are on
    assert structure(own_model) == whole


def test_a_pass_inside_another_sees_the_outer_ones_hooks(own_model):
    batch = batch_of(own_model)
    outer, inner = (all_hooks(own_model, [Add(random_direction(seed), layer=1)]) for seed in (0, 1))
    both = bridge(own_model, batch, [*outer, *inner])
    with running(own_model, outer):
        alone = logits(own_model, batch)
        assert torch.equal(logits(own_model, batch, inner), both)
        assert torch.equal(logits(own_model, batch), alone)
        assert torch.equal(bridge(own_model, batch, inner), both)
    assert torch.equal(alone, bridge(own_model, batch, outer))
    assert not torch.equal(alone, both)


def test_two_threads_do_not_see_each_others_interventions(tiny_model):
    model = tiny_model("llama")
    chat, results = ChatFormat(model.tokenizer), {}
    changes = {"plain": [], "added": [Add(random_direction(0), 4.0)], "ablated": [Ablate(random_direction(1))]}
    alone = {
        name: generate(model, chat, ASKS, interventions=change, max_new_tokens=8) for name, change in changes.items()
    }
    assert len({tuple(answer.token_ids for answer in answers) for answers in alone.values()}) == 3

    def work(name):
        results[name] = [generate(model, chat, ASKS, interventions=changes[name], max_new_tokens=8) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [answers] * 5 for name, answers in alone.items()}


def test_a_pass_waits_until_another_threads_pass_has_ended(own_model):
    batch, done = batch_of(own_model), threading.Event()
    expected, found = logits(own_model, batch), []
    hooks = all_hooks(own_model, [Ablate(random_direction(0))])
    thread = threading.Thread(target=lambda: (found.append(logits(own_model, batch)), done.set()))
    with running(own_model, hooks):
        thread.start()
        assert not done.wait(0.5)
        assert not torch.equal(logits(own_model, batch), expected)  # this thread goes on, under its own hooks
    assert done.wait(20)
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_hooks_and_modules_are_as_before_after_an_exception(own_model, error, monkeypatch):
    batch, before = batch_of(own_model), structure(own_model)
    hooks = all_hooks(own_model, [Ablate(random_direction(0))])
    plain = logits(own_model, batch)

    def broken(activation, hook):
        raise error

    broken.__module__ = "refusal_mi.something"  # as if it were the package's own
    with pytest.raises(error):
        logits(own_model, batch, [*hooks, (resid_hook(3, N_LAYERS), broken)])
    assert structure(own_model) == before
    for n_swaps in (0, 1, 7):
        with monkeypatch.context() as patched:
            patched.setattr(wrappers, "Fire", interrupting(n_swaps, error))
            with pytest.raises(error):
                logits(own_model, batch, hooks)
        assert structure(own_model) == before
    assert not any(point.fwd_hooks for point in own_model.hook_dict.values())
    assert torch.equal(logits(own_model, batch), plain)


def interrupting(n, error):
    """A `Fire` of which the n-th one made raises, in the middle of taking wrappers out."""
    left = [n]

    class Fire(wrappers.Fire):
        def __init__(self, point):
            left[0] -= 1
            if left[0] < 0:
                raise error
            super().__init__(point)

    return Fire


def test_the_lock_is_let_go_after_an_exception(own_model):
    with pytest.raises(ZeroDivisionError), running(own_model):
        raise ZeroDivisionError
    done = []
    thread = threading.Thread(target=lambda: done.append(logits(own_model, batch_of(own_model))))
    thread.start()
    thread.join(timeout=20)
    assert done


def test_copies_and_pickles_of_a_model_that_ran_run_on_their_own(own_model):
    batch, before = batch_of(own_model), logits(own_model, batch_of(own_model))
    other = copy.deepcopy(own_model)
    with torch.no_grad():
        other.blocks[2].mlp.out.original_component.weight.mul_(0.5)
    assert torch.equal(logits(other, batch), bridge(other, batch))
    assert not torch.equal(logits(other, batch), before)
    assert torch.equal(logits(own_model, batch), before)
    assert "_refusal_mi" not in "".join(vars(own_model))
    assert pickle.dumps(own_model.cfg.to_dict() if hasattr(own_model.cfg, "to_dict") else 0)


def test_blocks_that_are_used_twice_run_as_on_the_bridge(own_model):
    layers = own_model.original_model.model.layers
    layers[3] = layers[1]
    batch, hooks = batch_of(own_model), all_hooks(own_model, [Ablate(random_direction(0))])
    before = structure(own_model)
    assert torch.equal(logits(own_model, batch), bridge(own_model, batch))
    assert torch.equal(logits(own_model, batch, hooks), bridge(own_model, batch, hooks))
    assert structure(own_model) == before


def test_modules_with_accelerate_hooks_run_as_on_the_bridge(own_model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    batch, plain = batch_of(own_model), logits(own_model, batch_of(own_model))
    add_hook_to_module(own_model.blocks[1].mlp.out.original_component, Doubling())
    assert not is_untouched(own_model)
    changed = logits(own_model, batch)
    assert torch.equal(changed, bridge(own_model, batch))
    assert (changed - plain).abs().max() > 1e-3


def test_a_hook_point_inside_a_wrapper_leads_to_the_bridge(own_model):
    batch = batch_of(own_model)
    name = "blocks.1.attn.hook_z"
    hooks = [(name, module_hook)]
    assert wrappers.what_to_leave_out(own_model, hooks) is None
    assert torch.equal(logits(own_model, batch, hooks), bridge(own_model, batch, hooks))
    assert (logits(own_model, batch, hooks) - logits(own_model, batch)).abs().max() > 1e-3


def module_hook(activation, hook):
    return activation * 0


module_hook.__module__ = "refusal_mi.something"  # as if it were the package's own


def test_hooks_get_the_hook_point_and_may_return_nothing(own_model):
    seen = []

    def look(activation, hook):
        seen.append(hook.name)

    look.__module__ = "refusal_mi.something"
    name, batch = write_hooks(N_LAYERS)[3], batch_of(own_model)
    assert torch.equal(logits(own_model, batch, [(name, look)]), bridge(own_model, batch, [(name, look)]))
    assert seen[0] == seen[1]


def test_greedy_text_under_ablation_is_the_bridges(tiny_model, monkeypatch):
    model = tiny_model("qwen2")
    chat, ablation = ChatFormat(model.tokenizer), [Ablate(random_direction(0))]
    found = generate(model, chat, ASKS, interventions=ablation, max_new_tokens=12, batch_size=3)
    monkeypatch.setattr("refusal_mi.model.running.what_to_leave_out", lambda model, hooks, **_: None)
    assert found == generate(model, chat, ASKS, interventions=ablation, max_new_tokens=12, batch_size=3)


def test_what_a_hook_of_the_caller_keeps_can_be_differentiated_through(own_model):
    chat, kept = ChatFormat(own_model.tokenizer), []
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
    model, other = (load_model(tmp_path, device="cpu") for _ in range(2))
    for length in (20, 100, 20):
        tokens = torch.arange(2 * length).reshape(2, length) % 200
        batch = TokenBatch(tokens, torch.ones_like(tokens))
        assert torch.equal(logits(model, batch), bridge(other, batch))


SHAPES = {
    "opt": {"ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": D_MODEL},
    "bloom": {"n_layer": 3, "n_head": 4},
    "qwen2": {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", SHAPES)
def test_families_whose_modules_need_whole_streams_get_them(family, tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), hidden_size=D_MODEL, **SHAPES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    chat, batch = ChatFormat(model.tokenizer), batch_of(model)
    n_positions, last = len(chat.positions), LastPositions(model, 1, 2)
    whole = residuals(model, batch, range(3), n_positions)
    expected = torch.stack([stream.double().mean(0) for stream in whole], dim=1)
    found = mean_activations(model, chat, ASKS[:3], batch_size=1).means
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    residuals(model, batch, [2], 2, narrow=last)
    assert last.is_used == (family == "qwen2")
