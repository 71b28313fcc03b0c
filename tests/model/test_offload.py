"""Parts of a model on disk: weights go when a pass ends, however it ends, and are read once for many passes."""

import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, AblateInTurn, Add, Affine
from refusal_mi.model import blockwise
from refusal_mi.model.blockwise import offloaded_blocks
from refusal_mi.model.loading import load_model
from refusal_mi.model.running import all_logits, running
from refusal_mi.reading import mean_activations, template_residuals
from refusal_mi.search.block_passes import BlockPasses, passes_for
from refusal_mi.search.localize import map_writes
from refusal_mi.search.passes import AblateEach, AblateWritesEach, AddEach
from refusal_mi.search.removals import RemovalScorer
from refusal_mi.search.staged import staged_sweep
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import N_LAYERS, tiny_tokenizer
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.passes import batch_of, logits
from tests.helpers.tiers import first_is_fast

LLAMA = ("model.layers", "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
NAMES = {
    "llama": LLAMA,
    "gemma2": LLAMA,
    "olmo2": LLAMA,
    "granite": LLAMA,
    "gpt2": ("transformer.h", "transformer.wte", "transformer.ln_f", "transformer.wpe", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.rotary_emb", "lm_head"),
}
"""Of each family, where blocks lie, and what is outside of them."""


def split_of(family, on_cpu=(0, 3)):
    """Two blocks in memory, everything else on disk."""
    layers, *others = NAMES[family]
    return {f"{layers}.{n}": "cpu" if n in on_cpu else "disk" for n in range(N_LAYERS)} | dict.fromkeys(others, "disk")


@pytest.fixture
def split(tiny_dir):
    return lambda family, **how: load_model(tiny_dir(family), device_map=split_of(family, **how))


@pytest.fixture
def reads(monkeypatch):
    """How often each weight was looked up."""
    counted, get = Counter(), OffloadedWeightsLoader.__getitem__

    def look_up(self, key):
        counted[key] += 1
        return get(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", look_up)
    return counted


def pass_by_pass(monkeypatch):
    """Whatever runs block by block runs in whole passes from now on."""
    for module in ("refusal_mi.reading", "refusal_mi.search.block_passes"):
        monkeypatch.setattr(f"{module}.offloaded_blocks", lambda model: None)


def n_loaded(root, where):
    """How many of the weights that belong on disk are in memory."""
    away = [name for name, place in where.items() if place == "disk"]
    named = root.named_parameters(remove_duplicate=False)
    names = ((name.replace("._original_component", ""), parameter) for name, parameter in named)
    return sum(not parameter.is_meta for name, parameter in names if any(name.startswith(f"{part}.") for part in away))


def breaking(monkeypatch, n_calls, error):
    """From the n-th matrix product of a pass on, there is an error in the middle of a module."""
    left, multiply = [n_calls], torch.nn.functional.linear

    def linear(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return multiply(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_no_weights_stay_after_an_error_inside_a_module(family, tiny_dir, monkeypatch):
    where = split_of(family, on_cpu=())
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_dir(family), device_map=where, attn_implementation="eager")
    tokens = torch.arange(12).reshape(2, 6)

    def loaded_after(model, n_calls, error):
        with monkeypatch.context() as patched, torch.no_grad():
            breaking(patched, n_calls, error)
            with pytest.raises(error):
                model(tokens, use_cache=False)
        return n_loaded(hf_model, where)

    assert n_loaded(hf_model, where) == 0
    assert loaded_after(hf_model, 0, ZeroDivisionError) > 0, "what accelerate leaves"
    with torch.no_grad():
        expected = hf_model(tokens).logits  # and a whole pass cleans up
    assert n_loaded(hf_model, where) == 0
    model = load_model(hf_model, tokenizer=tiny_tokenizer())
    n_kept = n_loaded(hf_model, where)
    assert n_kept == 0 or family == "gpt_neox", "TransformerLens keeps the parts of a joint matrix"
    for n_calls, error in product(range(0, 12, 2), (ZeroDivisionError, KeyboardInterrupt)):
        assert loaded_after(hf_model, n_calls, error) == n_kept, n_calls
        assert loaded_after(model, n_calls, error) == n_kept, n_calls
    with torch.no_grad():
        assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_no_weights_stay_after_an_early_exit_or_an_error_in_a_hook(split):
    model, where = split("llama"), split_of("llama")
    batch = batch_of(model)

    def broken(x, hook):
        raise ZeroDivisionError

    for _ in range(3):
        for layer in range(1, N_LAYERS):
            model.run_with_cache(batch.tokens, names_filter=[], stop_at_layer=layer)
            assert n_loaded(model.original_model, where) == 0
        for point in ("attn.hook_z", "attn.q.hook_out", "mlp.hook_post", "hook_resid_post"):
            with pytest.raises(ZeroDivisionError), running(model, [(f"blocks.2.{point}", broken)]):
                all_logits(model, batch)
            assert n_loaded(model.original_model, where) == 0


def test_means_are_bit_for_bit_those_of_whole_passes_and_read_every_weight_once(split, tiny_model, reads, monkeypatch):
    model, prompts = split("llama"), [*ASKS, *CHATS]
    chat = ChatFormat(model.tokenizer)
    offloaded_blocks(model)  # the trial, once for each model
    reads.clear()
    found = mean_activations(model, chat, prompts, batch_size=2).means
    assert len(reads) > 20 and {n for name, n in reads.items() if "layers" in name} == {1}
    assert not any("layers.4" in name or "lm_head" in name for name in reads), "what nobody reads does not run"
    everywhere = template_residuals(model, chat, prompts, batch_size=2)
    assert n_loaded(model.original_model, split_of("llama")) == 0
    reads.clear()
    pass_by_pass(monkeypatch)
    assert torch.equal(mean_activations(model, chat, prompts, batch_size=2).means, found)
    assert min(reads.values()) >= len(prompts) // 2, "a plain pass reads all of them"
    assert torch.equal(template_residuals(model, chat, prompts, batch_size=2), everywhere)
    whole = mean_activations(tiny_model("llama"), chat, prompts, batch_size=2).means
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def test_prompts_that_do_not_fit_together_give_the_same(split, monkeypatch):
    model, prompts = split("llama"), [*ASKS, *CHATS]
    chat = ChatFormat(model.tokenizer)
    expected, seen = mean_activations(model, chat, prompts, batch_size=2).means, []
    run = blockwise.Blocks.run
    monkeypatch.setattr(
        blockwise.Blocks, "run", lambda self, passes, *a, **k: (seen.append(len(passes)), run(self, passes, *a, **k))
    )
    monkeypatch.setattr(blockwise, "STATE_BYTES", 5 * 60 * 32 * 4)
    assert torch.equal(mean_activations(model, chat, prompts, batch_size=2).means, expected)
    assert len(seen) > 2


@pytest.mark.parametrize("n_calls", [0, 9, 40])
def test_no_weights_stay_where_a_run_by_blocks_is_interrupted(n_calls, split, monkeypatch):
    model, where = split("llama"), split_of("llama")
    chat = ChatFormat(model.tokenizer)
    expected = mean_activations(model, chat, ASKS).means
    with monkeypatch.context() as patched:
        breaking(patched, n_calls, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            mean_activations(model, chat, ASKS, batch_size=2)
    assert n_loaded(model.original_model, where) == 0
    assert torch.equal(mean_activations(model, chat, ASKS).means, expected)


def test_two_threads_on_one_model_wait_for_each_other(split):
    model = split("llama")
    chat = ChatFormat(model.tokenizer)
    grid = difference_in_means(*(mean_activations(model, chat, texts, batch_size=2) for texts in (ASKS, CHATS)))
    expected = scores_of(model, chat, grid)

    def work(_):
        scores = scores_of(model, chat, grid)
        return mean_activations(model, chat, ASKS, batch_size=2).means, scores

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(4)))
    for means, scores in results:
        assert torch.equal(means, results[0][0]) and torch.equal(scores, expected)
    assert n_loaded(model.original_model, split_of("llama")) == 0


def test_nothing_is_held_between_two_logits_of_a_search(split):
    model, where = split("llama"), split_of("llama")
    rows = [ChatFormat(model.tokenizer).encode(text) for text in ASKS[:2]]
    each = BlockPasses(offloaded_blocks(model), rows, 0).each_ablated(
        [random_direction(0), random_direction(1)], [0, 1]
    )
    one = next(each)
    assert n_loaded(model.original_model, where) == 0
    with ThreadPoolExecutor(1) as pool:  # another thread's pass, in the middle
        pool.submit(logits, model, batch_of(model)).result(timeout=60)
    assert next(each).shape == one.shape


def scores_of(model, chat, grid, **how):
    scores = sweep(model, chat, grid, ASKS[:3], CHATS[:2], [5, (7, 9)], **how)
    return torch.tensor([[row.bypass, row.induce, row.kl_nats] for row in scores.rows if row.is_finite])


def test_not_sharing_the_beginning_is_said_as_it_is_in_memory(split, tiny_model):
    for model in (split("gemma2"), tiny_model("gemma2")):
        chat = ChatFormat(model.tokenizer)
        rows = [chat.encode(text) for text in (ASKS[0], "word " * 12)]  # longer than the sliding window
        with pytest.warns(UserWarning, match="sharing work changes a probability by .* on this model: not shared"):
            passes_for(model, rows, chat.pad_id)


@pytest.mark.parametrize("family", first_is_fast(NAMES))
def test_a_sweep_by_blocks_gives_the_folders_scores(family, split, tiny_model, reads, monkeypatch):
    model, whole = split(family), tiny_model(family)
    chat, n_before = ChatFormat(model.tokenizer), n_loaded(model.original_model, split_of(family))
    grid = difference_in_means(*(mean_activations(whole, chat, texts) for texts in (ASKS, CHATS)))
    with warnings.catch_warnings(record=True) as said_in_memory:
        warnings.simplefilter("always")
        expected = scores_of(whole, chat, grid)
    reads.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = scores_of(model, chat, grid)
    for each in (said, said_in_memory):
        assert ["not shared" in str(one.message) for one in each] == [True] * (family == "gemma2"), "a sliding window"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(found) > 15 and len({round(row[1].item(), 5) for row in found}) > 10
    inside = {name: n for name, n in reads.items() if NAMES[family][0] in name}
    assert max(inside.values()) <= 8, "the trial, the plain prompts, additions and ablations"
    monkeypatch.setattr(blockwise, "STATE_BYTES", 30 * 60 * 32 * 4)
    reads.clear()
    torch.testing.assert_close(scores_of(model, chat, grid), expected, rtol=1e-5, atol=1e-5)
    assert max(reads[name] for name in inside) > max(inside.values()), "less memory, more reading"
    assert n_loaded(model.original_model, split_of(family)) == n_before  # TransformerLens keeps GPT-2's q, k, v


def test_a_staged_search_and_removals_run_by_blocks(split, tiny_model):
    model, whole = split("llama"), tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    grid = difference_in_means(*(mean_activations(whole, chat, texts) for texts in (ASKS, CHATS)))
    found, expected = (staged_sweep(each, chat, grid, ASKS[:4], CHATS[:4], [5, 7]) for each in (model, whole))
    assert [row.skipped for row in found.rows] == [row.skipped for row in expected.rows]
    torch.testing.assert_close(found.per_prompt, expected.per_prompt, rtol=1e-5, atol=1e-5, equal_nan=True)
    direction = grid.direction(-1, 2)
    maps = [map_writes(RemovalScorer(each, chat, ASKS[:3], CHATS[:2], [5]), direction) for each in (model, whole)]
    for one, other in zip(*maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_hooks_of_the_caller_see_whole_passes(split):
    model, seen = split("llama"), []
    chat = ChatFormat(model.tokenizer)
    assert offloaded_blocks(model) is not None
    rows = [chat.encode(text) for text in ASKS]
    passes = passes_for(model, rows, chat.pad_id)
    assert isinstance(passes, BlockPasses) and passes.n_common > 0, "the template's beginning is shared"
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x.shape[0]))]):
        with pytest.warns(UserWarning, match="hooks on this model: every pass reads all weights from disk"):
            assert offloaded_blocks(model) is None
        with pytest.warns(UserWarning, match="hooks on this model"):
            mean_activations(model, chat, ASKS[:4], batch_size=2)
    assert seen == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert offloaded_blocks(model) is not None


def test_a_model_that_hands_on_more_than_its_stream_runs_pass_by_pass(tiny_dir, tiny_model, monkeypatch):
    rotate = LlamaRotaryEmbedding.forward

    def scaled(self, x, *args, **kwargs):
        """Positions that depend on what the embedding gave."""
        return tuple(part * (1 + x.abs().mean()) for part in rotate(self, x, *args, **kwargs))

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", scaled)
    model, whole = (
        load_model(tiny_dir("llama"), device_map=split_of("llama")),
        load_model(tiny_dir("llama"), device="cpu"),
    )
    chat = ChatFormat(model.tokenizer)
    with pytest.warns(UserWarning, match="reads all weights from disk"):
        found = mean_activations(model, chat, ASKS).means
    torch.testing.assert_close(found, mean_activations(whole, chat, ASKS).means, rtol=1e-5, atol=1e-6)


def test_a_model_in_memory_does_not_run_by_blocks(tiny_model, tiny_dir):
    assert offloaded_blocks(tiny_model("llama")) is None
    everything = dict.fromkeys(split_of("llama"), "cpu")
    assert offloaded_blocks(load_model(tiny_dir("llama"), device_map=everything)) is None


def test_a_map_of_gpu_and_cpu_is_one_line(tiny_dir):
    where = {name: 0 if name.endswith(".1") else place for name, place in split_of("llama").items()}
    with pytest.raises(UserError, match="mixes CPU/disk offload targets with a GPU") as error:
        load_model(tiny_dir("llama"), device_map=where)
    assert "\n" not in str(error.value)


def test_hooks_follow_the_device_of_the_activation(tiny_model):
    model, one, other = tiny_model("llama"), random_direction(0), random_direction(1)
    units, weights = torch.stack([one.unit, other.unit]), {"blocks.1.hook_attn_out": 0.5}
    changes = [
        *(Ablate([one, other]), AblateInTurn([one, other]), Add(one), Affine(one, 0.5)),
        *(AblateEach(units), AblateWritesEach.of([one, other], [weights, weights])),
        AddEach(units, 2, torch.zeros(2, 5, model.cfg.d_model)),
    ]
    for change in changes:
        hooks = change.hooks(model)
        assert hooks
        for _, function in hooks:
            changed = function(torch.zeros(4, 5, model.cfg.d_model, device="meta"), hook=None)
            assert changed.device.type == "meta" and changed.shape == (4, 5, model.cfg.d_model)
