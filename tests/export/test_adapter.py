"""An exported LoRA adapter does what the hooks did, and can be taken off again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusal_mi.errors import UserError
from refusal_mi.export.adapter import load_adapter
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_adapter, export_checkpoint
from refusal_mi.files import read_json, sha256_file
from refusal_mi.interventions import Ablate, Add
from tests.helpers.directions import random_direction
from tests.helpers.exports import hooked_logits, plain_logits, some_tokens

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
R, OTHER = random_direction(1), random_direction(2)
CASES = [
    ("qwen2", [Ablate([R, OTHER])]),
    ("gemma", [Ablate(R, constants=[1.5])]),
    ("gpt2", [Ablate(R, strength=0.5), Add(OTHER, 0.3)]),
    ("gpt_oss", [Ablate(R), Add(OTHER, 0.3)]),
    ("mixtral", [Ablate(R, layers=range(1, 4))]),
    ("falcon", [Ablate(R, components=["mlp"])]),
    ("qwen3_moe", [Ablate(R)]),
    ("granite", [Add(OTHER, 0.3)]),
]


def adapted_logits(source, adapter):
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    model = load_adapter(base, adapter)
    batch = some_tokens()
    with torch.no_grad():
        on = model(batch.tokens).logits.flatten(0, 1)
        with model.disable_adapter():
            off = model(batch.tokens).logits.flatten(0, 1)
    return on, off


@pytest.mark.parametrize("family, what", CASES)
def test_the_adapter_gives_the_hooked_logits_and_comes_off(family, what, tmp_path, tiny_dir):
    source = tiny_dir(family)
    export_adapter(source, what, tmp_path / "adapter", verify="none")
    on, off = adapted_logits(source, tmp_path / "adapter")
    plain = plain_logits(source)
    hooked = hooked_logits(source, what)
    assert (plain - hooked).abs().max() > 0.02
    assert (on - hooked).abs().max() <= 2e-5
    assert torch.equal(off, plain)


@pytest.mark.slow
def test_an_adapter_is_small_verified_and_says_who_ignores_what(tmp_path, tiny_dir):
    source = tiny_dir("gpt_oss")
    report = export_adapter(source, Ablate(R), tmp_path / "adapter", prompts=["Count to ten"])
    assert report.verification.passed
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["r"] == 1
    files = [path for path in (tmp_path / "adapter").rglob("*.safetensors")]
    hashes = read_json(tmp_path / "adapter" / "refusal_mi.json")["sha256"]
    assert hashes["model.safetensors"] == {"source": sha256_file(source / "model.safetensors"), "export": None}
    for path in files:
        assert hashes[str(path.relative_to(tmp_path / "adapter"))]["export"] == sha256_file(path)
    assert sum(path.stat().st_size for path in files) < open_checkpoint(source).n_bytes / 3
    assert all(0 < figure.removed < 1 for figure in report.figures.values())
    card = (tmp_path / "adapter" / "README.md").read_text()
    for part in ("lora_bias", "target_parameters", "embedding-LoRA", "Unload"):
        assert part in card


def test_behind_a_post_norm_the_adapter_is_the_checkpoint(tmp_path, tiny_dir):
    source = tiny_dir("gemma2")
    report = export_adapter(source, Ablate(R), tmp_path / "adapter", verify="none")
    export_checkpoint(source, Ablate(R), tmp_path / "out", verify="none")
    on, off = adapted_logits(source, tmp_path / "adapter")
    assert (on - off).abs().max() > 0.05
    assert (on - plain_logits(tmp_path / "out")).abs().max() <= 2e-5
    assert any("a norm follows" in note for note in report.notes)


@pytest.mark.parametrize("family", ("mixtral", "gemma2"))
def test_what_no_adapter_can_carry_is_refused(family, tmp_path, tiny_dir):
    with pytest.raises(UserError, match="nothing carries"):
        export_adapter(tiny_dir(family), Add(OTHER, 1.0), tmp_path / "adapter")
    with pytest.raises(UserError, match="nothing is changed"):
        export_adapter(tiny_dir(family), Ablate(R, strength=0.0), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
