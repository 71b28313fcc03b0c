"""Loading, names of hook points, and the residual stream of 17 families against plain HF."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import refusal_mi
from refusal_mi.errors import UserError
from refusal_mi.model.loading import load_model, model_alias, resolve_source, unique_alias
from refusal_mi.model.points import (
    block_hook,
    caa_layer,
    check_raw_basis,
    component_of,
    layer_of_hook,
    missing_points,
    model_type,
    our_layer,
    output_hook,
    parameters_of,
    resid_hook,
    split_hook,
    stop_token_ids,
    write_hook,
    write_hooks,
)
from refusal_mi.model.running import all_logits, last_logits
from refusal_mi.model.running import residuals as read_residuals
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from tests.helpers.models import D_MODEL, FAMILIES, N_LAYERS, save_tiny
from tests.helpers.naive import ASKS, logits, prompt_ids, relative_error, residuals
from tests.helpers.tiers import first_is_fast


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_a_padded_batch_has_the_stream_and_logits_of_plain_hf(family, tiny_model, plain_model):
    model, hf = tiny_model(family), plain_model(family)
    chat = ChatFormat(model.tokenizer)
    batch = chat.batch(ASKS[:3])
    layers = range(N_LAYERS)
    with torch.no_grad():
        found = torch.stack(read_residuals(model, batch, layers, 5), dim=2)
        last = last_logits(model, batch)
    assert found.shape == (3, 5, N_LAYERS, D_MODEL)
    for row, ask in enumerate(ASKS[:3]):
        ids = prompt_ids(model.tokenizer, ask)
        assert relative_error(found[row], residuals(hf, ids)[-5:]) < 1e-5
        assert relative_error(last[row], logits(hf, ids)[-1]) < 1e-5


def test_the_stream_after_the_last_block_is_before_the_final_norm(tiny_model, plain_model):
    model, hf = tiny_model("llama", "float64"), plain_model("llama", "float64")
    batch = ChatFormat(model.tokenizer).batch(ASKS[:1])
    with torch.no_grad():
        final = read_residuals(model, batch, [N_LAYERS], 1)[0][0, 0]
        assert relative_error(hf.lm_head(hf.model.norm(final)), logits(hf, batch.tokens[0].tolist())[-1]) < 1e-6
        after_norm = hf(batch.tokens, output_hidden_states=True).hidden_states[-1][0, -1]
    assert relative_error(after_norm, final) > 0.01


def test_last_logits_are_the_last_of_all_logits(tiny_model):
    model = tiny_model("gemma2")
    batch = ChatFormat(model.tokenizer).batch(ASKS)
    with torch.no_grad():
        whole = all_logits(model, batch)
        assert whole.shape[:2] == batch.tokens.shape
        assert torch.allclose(last_logits(model, batch), whole[:, -1], atol=1e-6)


def test_hook_names_of_layers():
    assert resid_hook(0, 4) == "blocks.0.hook_resid_pre"
    assert resid_hook(3, 4) == "blocks.3.hook_resid_pre"
    assert resid_hook(4, 4) == "blocks.3.hook_resid_post"
    for layer in (-1, 5):
        with pytest.raises(UserError, match=r"layer -?\d does not exist: this model has layers 0..4"):
            resid_hook(layer, 4)


def test_the_writes_are_the_embedding_and_both_outputs_of_every_block():
    names = write_hooks(2)
    assert names[0] == "blocks.0.hook_resid_pre"
    assert set(names[1:]) == {f"blocks.{block}.hook_{part}_out" for block in (0, 1) for part in ("attn", "mlp")}
    assert write_hooks(2, layers=[1], components=["mlp"]) == ["blocks.1.hook_mlp_out"]
    assert write_hooks(2, layers=[1], components=["embed"]) == []
    with pytest.raises(UserError, match=r"no block 2: this model has blocks 0..1"):
        write_hooks(2, layers=[0, 2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_names_of_hook_points_lead_there_and_back(family, tiny_model):
    model = tiny_model(family)
    names = [*write_hooks(N_LAYERS), *(resid_hook(layer, N_LAYERS) for layer in range(N_LAYERS + 1))]
    assert missing_points(model, [*names, "blocks.0.hook_nothing"]) == ["blocks.0.hook_nothing"]
    for name in names:
        block, point = split_hook(name)
        assert block_hook(block, point) == name
        component = component_of(point)
        assert component is None or write_hook(component, block) == name
    for layer in range(1, N_LAYERS + 1):
        assert output_hook(layer) == f"blocks.{layer - 1}.hook_resid_post"
        assert layer_of_hook(output_hook(layer)) == layer == our_layer(caa_layer(layer), N_LAYERS)


def test_every_parameter_is_counted_once(tiny_model):
    tied = tiny_model("gpt2")
    assert sum(value.numel() for value in parameters_of(tied)) == tied.original_model.num_parameters()


def test_only_the_folder_of_models_knows_how_transformer_lens_lays_them_out():
    package = Path(refusal_mi.__file__).parent
    layout = re.compile(
        r"original_model|hook_dict|original_component|\.ln_final|\.unembed\b|adapter\.apply|run_with_cache\(|\.blocks\b"
    )
    sources = {path: re.sub(r"(?m)^ *>>>.*$", "", path.read_text("utf-8")) for path in package.rglob("*.py")}
    known = {path.parent.name for path, text in sources.items() if layout.search(text)}
    assert known == {"model"}


def test_a_cpu_computes_in_float32_whatever_the_checkpoint_says(tmp_path):
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path, device="cpu").cfg.dtype == torch.float32
    half = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.original_model.parameters()} == {torch.bfloat16}
    assert not half.original_model.training


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing-like-this", "neither a directory with config.json, nor a GGUF file, nor a hub id"),
        ("./not/here", "neither a directory"),
        ("a/b/c", "neither a directory"),
        ("/no/such/folder", "neither a directory"),
    ],
)
def test_what_cannot_be_a_model_is_refused_without_loading(source, message):
    with pytest.raises(UserError, match=message):
        resolve_source(source)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no-such-type"}'])
def test_a_broken_config_is_a_user_error(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="cannot load the model in") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_a_user_error(tmp_path, tiny_dir):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_dir("llama") / name).read_bytes())
    with pytest.raises(UserError, match="cannot load the model in"):
        load_model(tmp_path)


def test_a_hub_id_without_a_network_says_what_to_do():
    with pytest.raises(UserError, match="without a network pass a local directory"):
        load_model("owner/name")


def test_aliases_differ_between_directories_of_one_name(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
        (tmp_path / parent / "model" / "config.json").write_text("{}")
    first, second = (tmp_path / parent / "model" for parent in ("a", "b"))
    assert model_alias(first) == model_alias(second) == "model"
    assert unique_alias(first) != unique_alias(second) and unique_alias(first).startswith("model-")
    assert model_alias("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen--Qwen2.5-1.5B-Instruct"
    assert model_alias(None) == unique_alias(None) == "organism"


def test_stop_tokens_are_those_of_generation_config_and_tokenizer(tiny_dir):
    model = load_model(tiny_dir("gpt2"), device="cpu")
    eos = model.tokenizer.eos_token_id
    assert stop_token_ids(model) == (eos,)
    model.original_model.generation_config.eos_token_id = [3, 1]
    assert stop_token_ids(model) == (1, 3, eos)
    model.original_model.generation_config.eos_token_id = 2
    assert stop_token_ids(model) == (2, eos)


PROCESSED = {
    "process_weights": lambda model: model.process_weights(),
    "compatibility mode": lambda model: model.enable_compatibility_mode(disable_warnings=True),
    "compatibility mode without processing": lambda model: model.enable_compatibility_mode(
        disable_warnings=True, no_processing=True
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("process", PROCESSED)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_a_model_is_refused_where_its_stream_is_another_and_only_there(family, process, dtype, tiny_dir):
    model, ids = load_model(tiny_dir(family), device="cpu", dtype=dtype), [[5, 6, 70, 80]]
    before = read_residuals(model, left_pad(ids, 0), range(N_LAYERS + 1), 4)
    check_raw_basis(model)
    PROCESSED[process](model)
    after = model.run_with_cache(torch.tensor(ids))[1]
    streams = [after[resid_hook(layer, N_LAYERS)] for layer in range(N_LAYERS + 1)]
    moved = max((a - b).norm() / a.norm() for a, b in zip(before, streams, strict=True))
    if moved > 0.1:
        with pytest.raises(ValueError, match=r"refusal_mi\.load_model"):
            check_raw_basis(model)
    else:
        assert moved < 10 * torch.finfo(model.cfg.dtype).eps
        ours = read_residuals(model, left_pad(ids, 0), range(N_LAYERS + 1), 4)
        assert all(
            (a - b).norm() <= 10 * torch.finfo(model.cfg.dtype).eps * a.norm()
            for a, b in zip(before, ours, strict=True)
        )
    assert (moved > 0.1) == (family in ("gpt2", "gpt_neox") and "without" not in process)


def test_the_model_type_is_hfs(tiny_model):
    assert model_type(tiny_model("gemma2")) == "gemma2"


def test_broken_weights_are_a_user_error(tmp_path):
    save_tiny("gpt2", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(tmp_path, device="cpu")


def test_weights_of_another_shape_than_the_config_are_a_user_error(tmp_path):
    save_tiny("llama", tmp_path)
    assert load_model(tmp_path, device="cpu").cfg.d_model == D_MODEL
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(UserError, match=r"do not have the shapes that its config\.json names"):
        load_model(tmp_path, device="cpu")


def change_weights(directory, change):
    """Rewrite the weight file of a checkpoint with the tensors that `change` makes of its own."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "is_missing", "n_missing", "first"),
    [
        ("llama", lambda name: name == "model.norm.weight", 1, "model.norm.weight"),
        ("llama", lambda name: name == "lm_head.weight", 1, "lm_head.weight"),
        ("llama", lambda name: ".layers.4." in name, 16, "model.layers.4.self_attn.q_proj.weight"),
        ("gpt2", lambda name: ".h.1." in name or ".h.4." in name, 24, "transformer.h.1.ln_1.weight"),
        ("gpt2", lambda name: name == "transformer.wte.weight", 1, "transformer.wte.weight"),
        ("mixtral", lambda name: ".layers.3." in name, 9, "model.layers.3.self_attn.q_proj.weight"),
    ],
    ids=["norm", "head", "last block", "two blocks", "tied embedding", "mixture"],
)
def test_weights_that_lack_tensors_are_a_user_error(tmp_path, family, is_missing, n_missing, first):
    save_tiny(family, tmp_path)
    change_weights(tmp_path, lambda found: {name: tensor for name, tensor in found.items() if not is_missing(name)})
    with pytest.raises(UserError) as caught:
        load_model(tmp_path, device="cpu")
    assert f"cannot load the model in {tmp_path}: {n_missing} tensor" in str(caught.value)
    assert f"first {first}; get the whole checkpoint again, or correct config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_attention_in_its_blocks_is_refused(tmp_path, tiny_dir):
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_model(tiny_dir("llama"), device="cpu").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(mamba\) has no hook point blocks.0.hook_attn_out: only models"):
        load_model(tmp_path, device="cpu")


def test_tied_weights_are_not_missing_and_extra_ones_are_allowed(tmp_path):
    tied = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    change_weights(tied, lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    change_weights(tied, lambda found: found | {"model.layers.9.extra.weight": torch.ones(4)})
    hf = load_model(tied, device="cpu").original_model
    assert hf.lm_head.weight.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
