"""Weights and logits of a direction, against hook outputs and hand-made products."""

import pytest
import torch

from refusal_mi.analysis.logits import direction_logits
from refusal_mi.analysis.weights import weight_alignment
from refusal_mi.errors import UserError
from refusal_mi.model.families import FAMILIES
from refusal_mi.model.readers import ModelWeights, NormMap, named_weights, norm_before, readers
from refusal_mi.model.running import read_out
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import HARMFUL
from tests.helpers.directions import direction_of, random_direction

LAYER = 2


def cached(model, names):
    chat = ChatFormat(model.tokenizer)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([chat.encode(HARMFUL[1])]), names_filter=list(names))
    return {name: cache[name][0].double() for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "phi3", "granite", "falcon"])
def test_heads_and_bias_sum_to_what_attention_adds(tiny_model, family):
    model = tiny_model(family)
    weights = ModelWeights(model)
    z_name, out_name = f"blocks.{LAYER}.attn.hook_z", f"blocks.{LAYER}.hook_attn_out"
    found = cached(model, [z_name, out_name])
    heads = weights.head_rows(LAYER).double()
    z = found[z_name].reshape(len(found[z_name]), *heads.shape[:2])
    summed = torch.einsum("phi,hid->pd", z, heads).detach()
    bias = [w for w in weights.layout.writers if w.layer == LAYER and w.component == "attn" and w.is_bias]
    summed = summed + sum(named_weights(model)[w.name].detach().double() for w in bias)
    gain = weights.gain("attn", LAYER)
    torch.testing.assert_close(summed * gain, found[out_name], rtol=1e-4, atol=1e-5)
    assert (summed.flip(-1) * gain - found[out_name]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_with_a_post_norm_they_sum_up_to_its_scale(tiny_model, family):
    model = tiny_model(family)
    weights = ModelWeights(model)
    z_name, out_name = f"blocks.{LAYER}.attn.hook_z", f"blocks.{LAYER}.hook_attn_out"
    found = cached(model, [z_name, out_name])
    heads = weights.head_rows(LAYER).double().detach()
    z = found[z_name].reshape(len(found[z_name]), *heads.shape[:2])
    summed = torch.einsum("phi,hid->pd", z, heads)
    scale = (summed.square().mean(-1, keepdim=True) + model.original_model.config.rms_norm_eps).sqrt()
    gain = weights.gain("attn", LAYER)
    torch.testing.assert_close(summed * gain / scale, found[out_name], rtol=1e-4, atol=1e-5)
    assert (gain - 1).abs().max() > 0.1


def test_writes_are_the_norms_of_products_with_raw_weights(tiny_model):
    model = tiny_model("llama")
    direction = random_direction()
    result = weight_alignment(model, direction, n_random=3)
    named = named_weights(model)
    output = named[f"model.layers.{LAYER}.self_attn.o_proj.weight"].detach().double()
    down = named[f"model.layers.{LAYER}.mlp.down_proj.weight"].detach().double()
    head = (direction.unit @ output)[8:16].norm()
    torch.testing.assert_close(result.writes[LAYER, 1], head)
    torch.testing.assert_close(result.writes[LAYER, -1], (direction.unit @ down).norm())
    gain = named[f"model.layers.{LAYER}.input_layernorm.weight"].detach().double()
    query = named[f"model.layers.{LAYER}.self_attn.q_proj.weight"].detach().double()
    column = result.reader_names.index("q")
    torch.testing.assert_close(result.reads[LAYER, column], (query @ (gain * direction.unit)).norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_taken_together(tiny_model, family):
    model = tiny_model(family)
    direction = random_direction()
    result = weight_alignment(model, direction, n_random=3)
    named, prefix = named_weights(model), f"model.layers.{LAYER}.mlp.experts"
    down, inward = (named[f"{prefix}.{name}"].detach().double() for name in ("down_proj", "gate_up_proj"))
    is_in_out = family == "gpt_oss"
    written = torch.einsum("eid,d->ei" if is_in_out else "edi,d->ei", down, direction.unit)
    torch.testing.assert_close(result.writes[LAYER, -1], written.norm())
    gain = named[f"model.layers.{LAYER}.post_attention_layernorm.weight"].detach().double()
    read = torch.einsum("edo,d->eo" if is_in_out else "eod,d->eo", inward, gain * direction.unit)
    torch.testing.assert_close(
        result.reads[LAYER, result.reader_names.index("experts")], read.norm(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "cohere", "falcon"])
def test_a_norm_and_its_reader_are_what_the_hooks_see(tiny_model, family):
    """With the norm's division put back, gain ⊙ x through the reader is the reader's own output."""
    model = tiny_model(family)
    names = [f"blocks.{LAYER}.hook_resid_pre", f"blocks.{LAYER}.attn.v.hook_out"]
    found = cached(model, names)
    x = found[names[0]]
    norm = NormMap.of(norm_before(model, LAYER, "attn"), model)
    centered = x - x.mean(-1, keepdim=True) if norm.is_centered else x
    like = next(iter(named_weights(model).values()))
    normed = norm.apply(x) / centered.square().mean(-1, keepdim=True).sqrt()
    value = readers(model, LAYER)["v"]
    zeros = torch.zeros(1, 1, model.cfg.d_model)
    with torch.no_grad():
        bias = model.blocks[LAYER].ln1(zeros)
        read = value(normed.to(like.dtype)[None] + bias)[0].double()
    torch.testing.assert_close(read, found[names[1]].reshape(read.shape), rtol=1e-3, atol=1e-4)
    assert norm.is_centered == (family in ("gpt2", "gpt_neox", "cohere", "falcon"))


def test_a_planted_writer_stands_out_and_random_directions_do_not(tiny_model):
    model = tiny_model("llama")
    rows = ModelWeights(model).head_rows(3)[2].double()
    strongest = torch.linalg.svd(rows).Vh[0]
    planted = direction_of(strongest.float(), 3)
    result = weight_alignment(model, planted, n_random=50)
    ratio = result.ratio("writes")
    assert ratio.argmax().item() == 3 * ratio.shape[1] + 2
    assert result.writes[3, 2] > 1.5 * result.writes_null_p95[3, 2]
    control = weight_alignment(model, planted.random_like(999), n_random=50)
    above = (control.writes > control.writes_null_p95).double().mean().item()
    assert above < 0.25 and 0.8 < control.ratio("writes").mean().item() < 1.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "olmo2", "gemma"])
def test_logits_are_those_of_a_stream_that_is_the_direction(tiny_model, family):
    model = tiny_model(family)
    direction = random_direction(1)
    everything = tuple(range(model.cfg.d_vocab))
    result = direction_logits(model, direction, everything, n_top=4, n_controls=2)
    with torch.no_grad():
        long = read_out(model, torch.stack([1e4 * direction.vector, torch.zeros_like(direction.vector)]))
    logits = (long[0] - long[1]).double()
    z = (logits - logits.mean()) / logits.std(correction=0)
    torch.testing.assert_close(result.refusal_z, z, rtol=1e-4, atol=1e-4)
    assert result.top_ids.tolist() == z.topk(4).indices.tolist()
    assert result.bottom_ids.tolist() == (-z).topk(4).indices.tolist()
    assert sorted(result.refusal_ranks.tolist()) == list(range(1, model.cfg.d_vocab + 1))
    assert result.refusal_ranks[result.top_ids[0]] == 1


def test_an_unknown_type_of_model_is_sent_to_analyses_that_read_no_weights(tiny_model, monkeypatch):
    model = tiny_model("gpt2")
    monkeypatch.delitem(FAMILIES, "gpt2")
    with pytest.raises(UserError, match="'gpt2'; project_residuals, linear_probes and patch_activations"):
        weight_alignment(model, random_direction())
