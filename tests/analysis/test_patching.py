"""Patching: a patched run is the run with that activation, and nothing where nothing differs."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.measures import refusal_score
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, cached
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

HARMFUL = ["Why?", "Tell me how a kite flies"]
HARMLESS = ["Say something short", "Go on"]
TOKENS = [5, 6, 7]
POINTS = {"resid": "hook_resid_pre", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def patched_by_hand(model, chat: ChatFormat, site: str, layer: int, position: int, pair: int) -> float:
    name = f"blocks.{layer}.{POINTS[site]}"
    given = cached(model, chat, HARMFUL[pair])[name][0, position]

    def patch(x: torch.Tensor, hook) -> torch.Tensor:
        x = x.clone()
        x[0, position] = given
        return x

    logits = model.run_with_hooks(torch.tensor([chat.encode(HARMLESS[pair])]), fwd_hooks=[(name, patch)])
    return refusal_score(logits[:, -1].detach(), TOKENS).item()


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_a_cell_is_the_run_with_that_activation(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    result = patch_activations(model, chat, HARMFUL, HARMLESS, TOKENS, sites=["resid", "mlp"], layers=(0, 2, 3))
    cells = [("resid", 0, -2, 1), ("resid", 3, -1, 0), ("mlp", 2, -3, 1)]
    for site, layer, position, pair in cells:
        expected = patched_by_hand(model, chat, site, layer, position, pair)
        slot = result.layers.index(layer)
        assert abs(result.patched[site][0, pair, slot, 5 + position].item() - expected) < 1e-5
    shift = (result.patched["resid"][0, :, 2, -1] - result.harmless_scores).mean()
    assert abs(result.effects("resid")[2, -1] - shift / result.gap_nats) < 1e-12
    assert (result.patched["resid"][0, :, 2] - result.harmless_scores[:, None]).abs().max() > 1e-3  # patches act


def test_the_interval_is_of_the_ratio_drawn_pair_by_pair(tiny_model) -> None:
    model = tiny_model("llama")
    harmful, harmless = [*HARMFUL, "z", "quiz"], [*HARMLESS, "ab", "a car"]
    result = patch_activations(model, ChatFormat(model.tokenizer), harmful, harmless, TOKENS, sites=["mlp"], layers=[0])
    gaps = torch.tensor([1.0, 2.0, 6.0, 12.0], dtype=torch.float64)
    plain = torch.zeros_like(gaps)
    shares = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.2, 0.7, 0.4, 0.55])
    intervals = []
    for share in shares:
        patched = {"mlp": torch.zeros_like(result.patched["mlp"])}
        patched["mlp"][0] += (share * gaps)[:, None, None]
        made = replace(result, patched=patched, harmful_scores=gaps, harmless_scores=plain)
        intervals.append((made.effects("mlp")[0, 0].item(), *made.interval("mlp", 0, 0)))
    assert intervals[0] == pytest.approx((0.5, 0.5, 0.5)), "half of the gap in every pair: no doubt, whatever the gaps"
    effect, low, high = intervals[1]
    assert 0.2 < low < effect < high < 0.7, "the control: where pairs differ there is"


def test_layer_zero_of_shared_tokens_and_identical_prompts_change_nothing_at_all(tiny_model) -> None:
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    same = ["Say it"] * 2
    result = patch_activations(
        model, chat, HARMFUL, same, TOKENS, sites=["resid", "heads"], layers=[0, 3], direction=random_direction()
    )
    assert (result.effects("resid")[0] == 0).all() and (result.effects("resid", "into harmful")[0] == 0).all()
    assert (result.directional_effects("resid")[0] == 0).all()
    for site in result.sites:
        assert (result.control_effects(site) == 0).all()
        assert result.effects(site)[1].abs().max() > 1e-3


def test_patching_along_the_whole_difference_is_patching_the_activation(tiny_model) -> None:
    model = tiny_model("gpt_neox")
    chat = ChatFormat(model.tokenizer)
    name = "blocks.3.hook_resid_pre"
    difference = (cached(model, chat, HARMFUL[1])[name][0, -1] - cached(model, chat, HARMLESS[1])[name][0, -1]).detach()
    along = {
        key: patch_activations(
            model,
            chat,
            HARMFUL,
            HARMLESS,
            TOKENS,
            sites=["resid"],
            layers=[3],
            direction=Direction(vector, 3, name, -1),
        )
        for key, vector in (("difference", difference), ("other", random_direction().vector))
    }
    whole = along["difference"].patched["resid"][0, 1, 0, -1]
    assert abs(along["difference"].directional["resid"][0, 1, 0, -1] - whole) < 1e-5
    assert abs(along["other"].directional["resid"][0, 1, 0, -1] - whole) > 1e-3
    shares = along["difference"].shares("resid")
    assert shares.isnan().equal(along["difference"].effects("resid") < 0.1)


@pytest.mark.slow
def test_batch_size_changes_nothing(tiny_model) -> None:
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    both = [
        patch_activations(model, chat, HARMFUL, HARMLESS, TOKENS, sites=["attn", "heads"], layers=[1], batch_size=size)
        for size in (1, 16)
    ]
    for site in ("attn", "heads"):
        torch.testing.assert_close(both[0].patched[site], both[1].patched[site], atol=5e-6, rtol=0)


@pytest.mark.slow
def test_saved_drawn_and_mistakes_named(tiny_model, tmp_path) -> None:
    model = tiny_model("qwen3_moe")
    chat = ChatFormat(model.tokenizer)
    result = patch_activations(
        model, chat, HARMFUL, HARMLESS, TOKENS, sites=["resid", "heads"], layers=[1, 4], direction=random_direction()
    )
    result.save(tmp_path / "patching.json")
    drawn = figures(load_result(tmp_path / "patching.json"))
    assert set(drawn) == {"patching", "patching_heads", "patching_directional"}
    effects = result.effects("resid")
    assert drawn["patching"].data[0].z[0][1] == pytest.approx(effects[1, 0].item())
    with pytest.raises(UserError, match="pairs"):
        patch_activations(model, chat, HARMFUL, HARMLESS[:1], TOKENS)
    parallel = tiny_model("gpt_neox")
    with pytest.raises(UserError, match="sites resid, attn or mlp"):
        patch_activations(parallel, chat, HARMFUL, HARMLESS, TOKENS, sites=["resid_mid"])
