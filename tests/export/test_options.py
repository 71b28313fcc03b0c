"""Partial, affine, added, half-precision and sharded exports mean what the same objects mean as hooks."""

import json

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_checkpoint, orthogonalize_
from refusal_mi.files import sha256_file
from refusal_mi.interventions import Ablate, AblateInTurn, Add
from refusal_mi.search.passes import AblateEach
from tests.helpers.directions import random_direction
from tests.helpers.exports import (
    hooked_logits,
    largest_component,
    plain_logits,
    save_model,
    some_tokens,
)
from tests.helpers.models import tiny_hf_model

R = random_direction(1)
THREE = [random_direction(seed) for seed in (1, 2, 3)]
INTERVENTIONS = {
    "three ranks": [Ablate(THREE)],
    "half": [Ablate(R, strength=0.5)],
    "layers": [Ablate(R, layers=range(1, 3))],
    "block 0": [Ablate(R, layers=[0])],
    "attention": [Ablate(R, components=["attn"])],
    "affine": [Ablate(R, constants=[1.5])],
    "affine, two": [Ablate(THREE[:2], constants=[1.5, -0.5])],
    "one after the other": [Ablate(THREE[0]), Ablate(THREE[1])],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("family", ("granite", "gpt2"))
def test_every_form_of_ablation_is_the_same_in_weights(family, name, tmp_path, tiny_dir):
    what = INTERVENTIONS[name]
    report = export_checkpoint(tiny_dir(family), what, tmp_path / "out", verify="none")
    hooked = hooked_logits(tiny_dir(family), what)
    assert (plain_logits(tiny_dir(family)) - hooked).abs().max() > 0.05
    assert (plain_logits(tmp_path / "out") - hooked).abs().max() <= 1e-5
    leftovers = [figure.leftover for figure in report.figures.values() if figure.leftover is not None]
    assert all(leftover < 1e-6 for leftover in leftovers)


@pytest.mark.parametrize("family, layer", [("gpt2", 2), ("gpt_oss", 3), ("falcon", 5), ("granite", 0), ("gpt2", 0)])
def test_an_addition_is_carried_by_a_bias_or_by_the_embedding(family, layer, tmp_path, tiny_dir):
    what = [Ablate(THREE[0]), Add(THREE[1], 0.3, layer=layer)]
    export_checkpoint(tiny_dir(family), what, tmp_path / "out", verify="none")
    hooked = hooked_logits(tiny_dir(family), what)
    assert (hooked_logits(tiny_dir(family), what[:1]) - hooked).abs().max() > 0.01
    assert (plain_logits(tmp_path / "out") - hooked).abs().max() <= 2e-5


def test_affine_leaves_the_constant_in_the_stream_of_a_gemma(tmp_path, tiny_dir):
    """The token embedding is multiplied after the constant was written into it."""
    what = [Ablate(R, constants=[1.5])]
    export_checkpoint(tiny_dir("gemma"), what, tmp_path / "out", verify="none")
    assert (plain_logits(tmp_path / "out") - hooked_logits(tiny_dir("gemma"), what)).abs().max() <= 1e-5


@pytest.mark.parametrize("what", ([Ablate(R, strength=0.0)], [Add(R, 0.0)]))
def test_strength_zero_changes_no_byte(what, tmp_path, tiny_dir):
    source = tiny_dir("gemma")
    report = export_checkpoint(source, what, tmp_path / "out", verify="full", prompts=["Count to ten"])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256_file(source / name) == sha256_file(tmp_path / "out" / name)
    assert report.figures == {}
    assert not report.is_untied
    assert report.verification.max_logit_difference <= 1e-5


def test_keep_tied_leaves_the_embedding_alone_on_both_sides(tmp_path, tiny_dir):
    source = tiny_dir("gemma")
    report = export_checkpoint(
        source, Ablate(R), tmp_path / "out", keep_tied=True, verify="full", prompts=["Count to ten"]
    )
    assert report.verification.passed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(open_checkpoint(source).tensors)
    without = hooked_logits(source, [Ablate(R, components=["attn", "mlp"])])
    assert (plain_logits(tmp_path / "out") - without).abs().max() <= 1e-5
    assert (plain_logits(tmp_path / "out") - hooked_logits(source, [Ablate(R)])).abs().max() > 0.01


@pytest.mark.parametrize("family", ("gemma", "cohere", "gpt2", "falcon"))
def test_a_tied_head_keeps_the_unedited_embedding(family, tmp_path, tiny_dir):
    export_checkpoint(tiny_dir(family), Ablate(R), tmp_path / "out", verify="none")
    before, after = open_checkpoint(tiny_dir(family)), open_checkpoint(tmp_path / "out")
    embedding = next(
        name
        for name in before.tensors
        if name.endswith(("embed_tokens.weight", "wte.weight")) or name.endswith("word_embeddings.weight")
    )
    assert torch.equal(after.read("lm_head.weight"), before.read(embedding))
    assert not torch.equal(after.read(embedding), before.read(embedding))


@pytest.mark.slow
def test_bfloat16_is_as_good_as_the_hooked_model_in_bfloat16(tmp_path):
    source = save_model("qwen2", tmp_path / "source", torch.bfloat16)
    report = export_checkpoint(source, Ablate(R), tmp_path / "out", prompts=["Count to ten", "Name a color"])
    found = report.verification
    assert found.rule == "half"
    assert found.passed
    assert 0 < found.mean_kl_nats <= 2 * found.hooked_kl_nats
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
    assert found.max_leftover > 1e-4  # rounding puts a little of the direction back

    wide = export_checkpoint(source, Ablate(R), tmp_path / "wide", dtype="float32", prompts=["Count to ten"])
    assert wide.verification.rule == "float32"
    assert wide.verification.passed
    assert "converted to float32" in (tmp_path / "wide" / "README.md").read_text()
    assert "original bytes" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_edited_one_by_one_and_the_untouched_are_copied(tmp_path):
    model = tiny_hf_model("gemma")
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    (tmp_path / "source" / "notes.txt").write_text("kept")
    (tmp_path / "source" / "consolidated.safetensors").write_bytes(b"the unedited weights")
    what = Ablate(R, layers=[4])
    report = export_checkpoint(tmp_path / "source", what, tmp_path / "out", verify="none")
    assert len(report.hashes) > 3
    same = [name for name, both in report.hashes.items() if both.source == both.export]
    assert 0 < len(same) < len(report.hashes)
    for name, both in report.hashes.items():
        assert both.export == sha256_file(tmp_path / "out" / name)
        assert both.source == sha256_file(tmp_path / "source" / name)
        assert (tmp_path / "out" / name).stat().st_ino != (tmp_path / "source" / name).stat().st_ino
    before, after = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "out")
    for name in set(before.tensors) - set(report.figures):
        assert torch.equal(before.read(name), after.read(name))
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    assert report.left_behind == ["consolidated.safetensors"]
    assert (plain_logits(tmp_path / "out") - hooked_logits(tmp_path / "source", [what])).abs().max() <= 1e-5


def test_an_index_names_the_untied_head(tmp_path):
    tiny_hf_model("gemma").save_pretrained(tmp_path / "source", max_shard_size="60KB")
    export_checkpoint(tmp_path / "source", Ablate(R), tmp_path / "out", verify="none")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = open_checkpoint(tmp_path / "out")
    assert "lm_head.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == after.n_bytes
    assert (plain_logits(tmp_path / "out") - hooked_logits(tmp_path / "source", [Ablate(R)])).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ("gemma2", "mixtral", "gpt2"))
def test_the_edit_in_memory_is_the_edit_on_disk(family, tmp_path, tiny_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dir(family), attn_implementation="eager")
    orthogonalize_(model, R)
    model.save_pretrained(tmp_path / "saved")
    export_checkpoint(tiny_dir(family), Ablate(R), tmp_path / "out", verify="none")
    with torch.no_grad():
        logits = model(some_tokens().tokens).logits.flatten(0, 1)
    assert (logits - plain_logits(tmp_path / "out")).abs().max() <= 1e-5
    assert (logits - plain_logits(tmp_path / "saved")).abs().max() <= 1e-5
    assert (logits - plain_logits(tiny_dir(family))).abs().max() > 0.05


def test_what_has_no_weight_form_is_refused(tmp_path, tiny_dir, tiny_model):
    llama, out = tiny_dir("qwen2"), tmp_path / "out"
    refused = {
        "positions": Ablate(R, positions="prompt"),
        "no weight form": AblateEach(R.unit[None]),
        "AblateInTurn has no weight form": AblateInTurn(THREE),
        "no bias": Add(R, 1.0, layer=2),
        "width 8": Ablate(random_direction(1, width=8)),
        "no block 9": Ablate(R, layers=[9]),
    }
    for message, what in refused.items():
        with pytest.raises(UserError, match=message):
            export_checkpoint(llama, what, out)
    with pytest.raises(UserError, match="norm"):
        export_checkpoint(tiny_dir("gemma2"), Add(R, 1.0, layer=2), out)
    for tied in (Ablate(R, constants=[1.0]), Ablate(R, components=["embed"]), Add(R, 1.0, layer=0)):
        with pytest.raises(UserError, match="keep-tied"):
            export_checkpoint(tiny_dir("gemma"), tied, out, keep_tied=True)
    with pytest.raises(UserError, match="not a TransformerBridge"):
        orthogonalize_(tiny_model("qwen2"), R)
    assert not out.exists()


def test_the_component_is_gone_everywhere(tmp_path, tiny_dir):
    export_checkpoint(tiny_dir("qwen3"), Ablate(R), tmp_path / "out", verify="none")
    assert largest_component(tiny_dir("qwen3"), R) > 0.1
    assert largest_component(tmp_path / "out", R) <= 1e-6
