"""Attribution: components sum to the projection, and each is what it says."""

import pytest
import torch

from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.analysis.sources import attribute_sources
from refusal_mi.errors import UserError
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, HEADS, PROMPTS, cached
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_components_sum_to_the_projection_of_the_stream(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attribute_direction(model, chat, direction, {"a": PROMPTS, "b": PROMPTS[:1]}, batch_size=16)
    for index, prompt in enumerate(PROMPTS):
        stream = cached(model, chat, prompt)["blocks.4.hook_resid_post"][0, -1].double()
        assert abs(result.projections["a"][index] - stream @ direction.unit) < 1e-5
    assert result.largest_error() < 1e-6
    assert result.heads["a"].abs().min(0).values.max() > 0.01  # the parts are there
    alone = attribute_direction(model, chat, direction, {"a": PROMPTS}, batch_size=1)
    torch.testing.assert_close(alone.heads["a"], result.heads["a"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ("gpt2", "gpt_neox"))
@pytest.mark.parametrize(("layer", "position"), ((None, -1), (2, -4)))
def test_sums_are_exact_in_float64(tiny_model, family: str, layer: int | None, position: int) -> None:
    model = tiny_model(family, "float64")
    chat = ChatFormat(model.tokenizer)
    result = attribute_direction(model, chat, random_direction(), {"a": PROMPTS}, layer=layer, position=position)
    relative = (result.sums("a") - result.projections["a"]).abs() / result.projections["a"].abs()
    assert relative.max() < 1e-10
    biases = result.attn_biases["a"].sum(-1) + result.mlp_biases["a"].sum(-1)
    assert biases.abs().min() > 1e-3  # without the biases the sum would be wrong


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_a_head_contributes_what_is_missing_without_it(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attribute_direction(model, chat, direction, {"a": PROMPTS})
    name = "blocks.2.hook_attn_out"
    written: list[torch.Tensor] = []

    def without_head(z: torch.Tensor, hook) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    tokens = torch.tensor([chat.encode(PROMPTS[1])])
    keep = (name, lambda x, hook: written.append(x[0, -1].double()))
    model.run_with_hooks(tokens, fwd_hooks=[keep])
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.attn.hook_z", without_head), keep])
    assert abs((written[0] - written[1]) @ direction.unit - result.heads["a"][1, 2, 1]) < 1e-5


def test_a_norm_after_attention_acts_with_the_scale_it_has_at_that_position(tiny_model) -> None:
    model = tiny_model("gemma2")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attribute_direction(model, chat, direction, {"a": PROMPTS})
    cache = cached(model, chat, PROMPTS[1])
    raw = cache["blocks.3.attn.hook_out"][0, -1].double()
    norm = model.original_model.model.layers[3].post_attention_layernorm
    scaled = (1 + norm.weight.double()) / (raw.square().mean() + norm.eps).sqrt() * direction.unit
    z, weight = cache["blocks.3.attn.hook_z"][0, -1].double(), model.blocks[3].attn.o.weight.double()
    for head in range(4):
        expected = weight[:, 8 * head : 8 * head + 8] @ z[head] @ scaled
        assert abs(expected - result.heads["a"][1, 3, head]) < 1e-5
    assert (scaled / direction.unit - 1).abs().max() > 0.1  # ignoring the norm would give something else


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_sources_sum_to_the_heads(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    whole = attribute_direction(model, chat, direction, {"a": PROMPTS})
    split = attribute_sources(model, chat, direction, PROMPTS, heads=HEADS, batch_size=16)
    expected = torch.stack([whole.heads["a"][:, layer, head] for layer, head in HEADS], dim=1)
    torch.testing.assert_close(split.contributions.sum(-1), expected, atol=2e-6, rtol=0)
    alone = attribute_sources(model, chat, direction, PROMPTS, heads=HEADS, batch_size=1)
    torch.testing.assert_close(alone.contributions, split.contributions, atol=2e-6, rtol=0)
    padding = torch.tensor([[token == "" for token in row] for row in split.tokens])
    assert padding.any() and (split.contributions.abs().sum(1)[padding] == 0).all()
    assert (split.contributions.abs() > 1e-3).sum(-1).min() > 1  # it is a split


def test_top_heads_are_ranked_by_contribution(tiny_model) -> None:
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    result = attribute_direction(model, chat, random_direction(), {"a": PROMPTS[:1], "b": PROMPTS[1:]})
    difference = result.heads["a"].mean(0) - result.heads["b"].mean(0)
    ranked = [difference[head].item() for head in result.top_heads(20, "a", "b")]
    assert ranked == sorted(difference.flatten().tolist(), reverse=True)


def test_results_come_back_from_disk_and_draw(tiny_model, tmp_path) -> None:
    model = tiny_model("gpt2")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attribute_direction(model, chat, direction, {"harmful": PROMPTS, "harmless": PROMPTS[:2]})
    result.save(tmp_path / "attribution.json")
    again = load_result(tmp_path / "attribution.json")
    assert again.largest_error() == result.largest_error() and again.groups == result.groups
    ranked = figures(again)["attribution_ranked"]
    best = max(result.components("harmful"), key=lambda name: abs(_difference(result, name)))
    assert ranked.data[0].y[0] == best
    split = attribute_sources(model, chat, direction, ["a</script><b>"], n_heads=2)
    page = figures(split)["sources_tokens"]
    assert page.count("</script>") == 1 and "https://unpkg" not in page


def test_mistakes_are_named(tiny_model) -> None:
    model = tiny_model("gpt2")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    with pytest.raises(UserError, match="position"):
        attribute_direction(model, chat, direction, {"a": PROMPTS}, position=-400)
    with pytest.raises(UserError, match="no prompt"):
        attribute_direction(model, chat, direction, {"a": []})
    with pytest.raises(UserError, match="layer 9"):
        attribute_direction(model, chat, direction, {"a": PROMPTS}, layer=9)
    with pytest.raises(UserError, match=r"no head \(0, 7\)"):
        attribute_sources(model, chat, direction, PROMPTS, heads=[(0, 7)])


def _difference(result, name: str) -> float:
    return (result.components("harmful")[name].mean() - result.components("harmless")[name].mean()).item()
