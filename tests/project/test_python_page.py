"""The blocks of docs/python.md run in their order, and do what the text says."""

import pytest
import torch

from refusal_mi.analysis.lens import refusal_lens
from refusal_mi.interventions import Ablate
from refusal_mi.loaded import load_run
from refusal_mi.measures import next_token_logits
from refusal_mi.reading import mean_activations
from tests.helpers.pages import ROOT, blocks, run_blocks
from tests.helpers.runs import finished_run

PAGE = ROOT / "docs/python.md"


@pytest.mark.slow
def test_the_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        finished_run(tmp_path / "runs" / name)
    names = run_blocks(PAGE, {})
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
    means = names["means"]
    assert means["plain"].abs().max() > 50 and means["exported"].abs().max() < 1  # stream units, by layer
    regions = names["looked"].to_frame().query("variant == 'plain'").groupby("region")["mass"].sum()
    assert regions["suffix"] == 0 and regions.sum() == pytest.approx(8 * 4, abs=1e-3)  # prompts x heads
    assert set(names["scores"].reset_index("run")["run"]) == {"x", "y"}


@pytest.mark.slow
def test_the_means_of_a_cache_are_those_of_mean_activations():
    names = run_blocks(PAGE, {}, slice(1))
    model, chat, means = names["model"], names["chat"], names["ActivationMeans"]
    asks = ["Describe a kite.", "Wreck the whole factory.", "Hi"]
    batch = chat.batch(asks)
    _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask)
    found, expected = means.from_cache(cache, chat.positions), mean_activations(model, chat, asks)
    assert found.positions == expected.positions and found.n_prompts == expected.n_prompts == 3
    assert torch.allclose(found.means, expected.means, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found.means, mean_activations(model, chat, asks[:2]).means, atol=1e-3, rtol=1e-3)


def test_the_block_of_a_finished_run_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = finished_run(tmp_path / "runs/x")
    place = next(index for index, block in enumerate(blocks(PAGE)) if block.startswith("run = load_run"))
    names = run_blocks(PAGE, {"load_run": load_run}, slice(place, place + 1))
    assert names["run"].path == folder.relative_to(tmp_path) and len(names["run"].rates.to_frame()) > 0
