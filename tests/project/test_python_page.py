"""The blocks of docs/python.md run in their order, and do what the text says."""

import re
from pathlib import Path

import pytest
import torch

from refusal_mi.analysis.lens import refusal_lens
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits
from refusal_mi.reading import mean_activations
from tests.helpers.runs import finished_run

PAGE = Path(__file__).parents[2] / "docs/python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run_blocks(blocks, names):
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.slow
def test_the_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(BLOCKS[:-1], {})
    model, chat, direction = (names[each] for each in ("model", "chat", "direction"))
    ask = ["Wreck a factory."]
    ours = next_token_logits(model, chat, ask, interventions=Ablate(direction))[0]
    plain = next_token_logits(model, chat, ask)[0]
    for logits in (names["ablated"], names["logits"]):
        assert torch.allclose(logits[0, -1].cpu(), ours, atol=1e-3)
        assert not torch.allclose(logits[0, -1].cpu(), plain, atol=0.1)
    with model.hooks(fwd_hooks=[]):
        assert torch.allclose(model(names["tokens"])[0, -1].cpu(), plain, atol=1e-3)  # no hook is left
    lens = names["lens"]
    assert isinstance(lens, type(refusal_lens(model, chat, "a", "b", (1,), n_controls=1))) and float(lens.gap[-1]) > 1
    assert (tmp_path / "mine.safetensors").exists()


@pytest.mark.slow
def test_the_means_of_a_cache_are_those_of_mean_activations():
    names = run_blocks(BLOCKS[:1], {})
    model, chat, means = names["model"], names["chat"], names["ActivationMeans"]
    asks = ["Describe a kite.", "Wreck the whole factory.", "Hi"]
    batch = chat.batch(asks)
    _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask)
    found, expected = means.from_cache(cache, chat.positions), mean_activations(model, chat, asks)
    assert found.positions == expected.positions and found.n_prompts == expected.n_prompts == 3
    assert torch.allclose(found.means, expected.means, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found.means, mean_activations(model, chat, asks[:2]).means, atol=1e-3, rtol=1e-3)


def test_the_last_block_reads_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = finished_run(tmp_path / "runs/x")
    names = run_blocks(["from refusal_mi import *", BLOCKS[-1]], {})
    assert names["run"].path == folder.relative_to(tmp_path) and len(names["run"].rates.to_frame()) > 0
