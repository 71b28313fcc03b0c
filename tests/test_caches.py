"""Means from TransformerLens' caches, the package's hooks in its tools, and run inputs named by a string."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refusal_mi import all_hooks, load_run
from refusal_mi.directions import ActivationMeans, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import next_token_logits
from refusal_mi.reading import mean_activations
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import HARMFUL, HARMLESS
from tests.helpers.directions import random_direction
from tests.helpers.runs import finished_run


@pytest.fixture(scope="module")
def llama(tiny_model):
    model = tiny_model("llama")
    return model, ChatFormat(model.tokenizer)


def cache_of(model, chat, asks, **options):
    batch = chat.batch(asks)
    return model.run_with_cache(batch.tokens, attention_mask=batch.mask, **options)[1]


def test_the_means_of_a_cache_are_those_of_the_package(llama):
    model, chat = llama
    caches = [cache_of(model, chat, side) for side in (HARMFUL, HARMLESS)]
    found = [ActivationMeans.from_cache(cache, chat.positions) for cache in caches]
    expected = [mean_activations(model, chat, side) for side in (HARMFUL, HARMLESS)]
    for a, b in zip(found, expected, strict=True):
        assert a.positions == b.positions and a.n_prompts == b.n_prompts and a.means.dtype == torch.float64
        torch.testing.assert_close(a.means, b.means, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0].means, expected[1].means, atol=1e-2)
    grids = difference_in_means(*found), difference_in_means(*expected)
    torch.testing.assert_close(grids[0].vectors, grids[1].vectors, atol=1e-5, rtol=1e-4)


def test_one_prompt_without_its_batch_axis_and_a_plain_dict(llama):
    model, chat = llama
    whole = cache_of(model, chat, ["tell me"], return_cache_object=False)
    bare = {name: value[0] for name, value in whole.items()}
    assert ActivationMeans.from_cache(bare) == ActivationMeans.from_cache(whole)
    assert ActivationMeans.from_cache(whole, [-2]).positions == (-2,)


def test_what_a_cache_lacks_is_one_line(llama):
    model, chat = llama
    whole = cache_of(model, chat, ["tell me"], return_cache_object=False)
    for cache in ({}, {name: value for name, value in whole.items() if not name.startswith("blocks.2.")}):
        with pytest.raises(UserError, match="of every block"):
            ActivationMeans.from_cache(cache)
    for positions in ((), (0,), (-1000,)):
        with pytest.raises(UserError, match="positions count from the end"):
            ActivationMeans.from_cache(whole, positions)


@pytest.mark.parametrize("change", [Ablate, Add])
def test_the_hooks_act_in_transformer_lens_as_in_the_package(llama, change):
    model, chat = llama
    step = change(random_direction(1))
    tokens = chat.batch("tell me").tokens
    ours = next_token_logits(model, chat, "tell me", interventions=step)[0]
    plain = next_token_logits(model, chat, "tell me")[0]
    with torch.no_grad():
        run = model.run_with_hooks(tokens, fwd_hooks=step.hooks(model))[0, -1]
        with model.hooks(fwd_hooks=all_hooks(model, step)):
            inside = model(tokens)[0, -1]
        after = model(tokens)[0, -1]
    for found in (run, inside):
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, plain, atol=1e-3)
    torch.testing.assert_close(after, plain, atol=1e-4, rtol=1e-4)


def test_run_inputs_take_a_string_and_a_run_gives_them(llama, tmp_path):
    model, _ = llama
    code = "from refusal_mi.run.folder import RunInputs; print(repr(RunInputs(None, '~').path))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == repr(Path.home()), done.stderr
    inputs = load_run(str(finished_run(tmp_path / "x"))).inputs(model, max_prompts=1, seed=3)
    assert inputs.path == tmp_path / "x" and (inputs.max_prompts, inputs.batch_size, inputs.seed) == (1, 32, 3)
    assert inputs.prompts("harmful", "val") == ["Do something"]
