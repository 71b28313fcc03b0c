"""However weights are stored: families, shards, ties, experts, adapters; and what cannot be compared is one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refusal_mi.audit import audit
from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.export import export_adapter, export_checkpoint
from refusal_mi.files import read_json, write_json
from refusal_mi.interventions import Ablate, Add
from refusal_mi.model.families import bare_name
from tests.helpers.audit import changed, low_rank
from tests.helpers.directions import random_direction
from tests.helpers.exports import POST_NORM, SWITCHED_OFF, save_model
from tests.helpers.models import D_MODEL, N_LAYERS

pytestmark = pytest.mark.filterwarnings("ignore")
R = random_direction(1)


def bare(names):
    return {bare_name(name) for name in names}


def edited_by(folder):
    return bare(read_json(folder / "refusal_mi.json")["edited_tensors"])


@pytest.mark.parametrize(
    "family", ("llama", "gpt2", "gemma2", "olmo2", "gpt_oss", "qwen3_moe", "mixtral", "falcon", "mpt")
)
def test_what_an_export_edited_is_what_lost_a_direction(family, tmp_path):
    """Biases, ties, norms after writers, experts in one tensor or in many, weights stored the other way round."""
    source = save_model(family, tmp_path / "source")
    export_checkpoint(source, Ablate(R, layers=range(1, 4)), tmp_path / "out", verify="none")
    result = audit(source, tmp_path / "out", R)
    assert bare(each.name for each in result.removed) == edited_by(tmp_path / "out")
    seen = R.unit.clone()
    if family in POST_NORM:  # this coordinate never reaches the stream
        seen[SWITCHED_OFF] = 0
    assert result.in_blocks() == (1, 2, 3) and result.cosines[0] == pytest.approx(seen.norm().item(), abs=1e-3)
    assert all(each.left < 0.01 and each.strength == pytest.approx(1, abs=0.01) for each in result.removed)
    assert not [kind for kind in result.kinds if kind.n_differ and kind.role not in ("attn", "mlp")]


@pytest.mark.parametrize("family", ("gemma2", "gpt2"))
def test_a_tie_that_an_export_broke_is_no_change_of_the_unembedding(family, tmp_path):
    source = save_model(family, tmp_path / "source")
    export_checkpoint(source, Ablate(R), tmp_path / "out", verify="none")
    result = audit(source, tmp_path / "out")
    kinds = {kind.role: kind for kind in result.kinds}
    assert kinds["head"].n == 1 and kinds["head"].n_differ == 0 and kinds["embed"].n_differ > 0
    assert not result.added


def test_shards_and_experts_that_are_fused_elsewhere(tmp_path):
    source = save_model("qwen3_moe", tmp_path / "source")
    export_checkpoint(source, Ablate(R), tmp_path / "out", verify="none")
    one_by_one = load_file(tmp_path / "out" / "model.safetensors")
    fused = {name: tensor for name, tensor in one_by_one.items() if ".experts." not in name}
    for block in range(N_LAYERS):
        stem = f"model.layers.{block}.mlp.experts"
        parts = [
            torch.stack([one_by_one[f"{stem}.{number}.{part}.weight"] for number in range(4)])
            for part in ("gate_proj", "up_proj", "down_proj")
        ]
        fused |= {f"{stem}.gate_up_proj": torch.cat(parts[:2], 1), f"{stem}.down_proj": parts[2]}
    shutil.copytree(tmp_path / "out", tmp_path / "fused", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    result = audit(source, tmp_path / "fused", R)
    assert result.in_blocks("mlp") == tuple(range(N_LAYERS)) and result.cosines[0] > 0.999
    assert {each.name for each in result.writers if each.component == "mlp"} == {
        f"model.layers.{block}.mlp.experts.down_proj" for block in range(N_LAYERS)
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = audit(source, tmp_path / "sharded", R)
    assert bare(each.name for each in sharded.removed) == edited_by(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("llama", {"layers": (0, 3)}), ("gemma", {"strength": 0.5})]
)
def test_an_adapter_is_what_it_becomes(family, options, tmp_path):
    """Biases and the embedding, which lies in a second part where there are biases."""
    source = save_model(family, tmp_path / "source")
    export_adapter(source, Ablate(R, **options), tmp_path / "adapter", verify="none")
    export_checkpoint(source, Ablate(R, **options), tmp_path / "out", verify="none")
    adapter, checkpoint = audit(source, tmp_path / "adapter", R), audit(source, tmp_path / "out", R)
    assert bare(each.name for each in adapter.removed) == edited_by(tmp_path / "out")
    for one, other in zip(adapter.writers, checkpoint.writers, strict=True):
        assert one.left == pytest.approx(other.left, abs=1e-4)
        assert one.change == pytest.approx(other.change, rel=1e-3)


def test_an_addition_is_no_removal(tmp_path):
    source = save_model("gpt2", tmp_path / "source")
    export_checkpoint(source, Add(R, 0.3), tmp_path / "out", verify="none")
    result = audit(source, tmp_path / "out", R)
    assert result.verdict == "other" and [each.name for each in result.writers if each.differs] == [
        "transformer.h.1.mlp.c_proj.bias"
    ]


def test_a_model_that_is_loaded_already(tmp_path):
    source = save_model("llama", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert audit(source, model).verdict == "none"
    with torch.no_grad():
        rows = model.model.layers[2].mlp.down_proj.weight
        rows -= torch.outer(R.unit.float(), R.unit.float() @ rows)
    result = audit(source, model, R)
    assert [each.block for each in result.removed] == [2] and result.cosines[0] > 0.999
    assert "in memory" in result.suspect


def test_tensors_that_the_base_has_not_are_named(tmp_path):
    source = save_model("llama", tmp_path / "source", mlp_bias=False)
    suspect = changed(source, tmp_path / "out", lambda matrix: matrix)
    tensors = load_file(suspect / "model.safetensors")
    save_file(
        tensors | {"model.layers.1.mlp.down_proj.bias": torch.ones(D_MODEL)},
        suspect / "model.safetensors",
        {"format": "pt"},
    )
    result = audit(source, suspect)
    assert result.verdict == "other" and result.added == ("layers.1.mlp.down_proj.bias",)
    assert "1 tensors are new" in result.explain()[0]


@pytest.fixture
def pair(tmp_path):
    """BASE and SUSPECT that fit each other."""
    source = save_model("qwen2", tmp_path / "base")
    return source, changed(source, tmp_path / "suspect", low_rank(1))


def write(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_does_not_fit_is_one_line(pair, tmp_path):
    base, suspect = pair
    other = save_model("llama", tmp_path / "other")
    with pytest.raises(UserError, match=r"BASE is a qwen2 of 5 blocks and width 32, SUSPECT a llama of 5"):
        audit(base, other)
    with pytest.raises(UserError, match=r"(embed_tokens|lm_head).weight has shape .* in BASE and .* in SUSPECT"):
        audit(base, save_model("qwen2", tmp_path / "longer", vocab_size=400))
    with pytest.raises(UserError, match="width 16 does not fit a model of width 32"):
        audit(base, suspect, torch.ones(16))
    tensors = load_file(suspect / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.down" not in name}
    save_file(lacking, suspect / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"becomes model.layers.2.mlp.down_proj.weight, which BASE has"):
        audit(base, suspect)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, suspect / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers.2.mlp.down_proj.weight holds numbers that are not finite"):
        audit(base, suspect)
    write(suspect, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="is quantized"):
        audit(base, suspect)


def test_an_adapter_that_is_not_plain_is_one_line(tmp_path):
    base = save_model("qwen2", tmp_path / "base")
    export_adapter(base, Ablate(R), tmp_path / "adapter", verify="none")
    config, weights = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    plain, tensors = config.read_text(), load_file(weights)
    for key, value in (("use_dora", True), ("rank_pattern", {"o_proj": 2}), ("peft_type", "IA3"), ("r", 0)):
        config.write_text(json.dumps(json.loads(plain) | {key: value}))
        with pytest.raises(UserError, match="not a plain LoRA adapter; merge"):
            audit(base, tmp_path / "adapter")
    config.write_text(plain)
    name = next(key for key in tensors if key.endswith("lora_A.weight"))
    for odd, message in (
        ({f"{name}.magnitude": torch.ones(1)}, "no part of a plain LoRA pair"),
        ({name.replace("layers.0", "layers.77"): torch.ones(1, 4)}, "half of a LoRA pair"),
        ({name: torch.ones(1, 4)}, "; BASE has"),
    ):
        save_file(tensors | odd, weights)
        with pytest.raises(UserError, match=message):
            audit(base, tmp_path / "adapter")
    save_file(tensors, weights)
    with pytest.raises(UserError, match="which BASE has not"):
        audit(save_model("gpt2", tmp_path / "other"), tmp_path / "adapter")


def test_the_command_prints_a_table_and_a_verdict(pair, tmp_path, capsys):
    base, _ = pair
    R.save(tmp_path / "r.pt")
    export_checkpoint(base, Ablate(R, layers=(1, 2)), tmp_path / "out", verify="none")
    line = ["audit", str(base), str(tmp_path / "out"), "--direction", str(tmp_path / "r.pt")]
    assert exit_status([*line, "--output-dir", str(tmp_path / "files")]) == 0
    out = capsys.readouterr().out
    assert "verdict: a direction was removed" in out and "attention outputs" in out and "1-2" in out
    assert "|cos| with the given direction (layer 2): 1.0000" in out
    assert max(len(row) for row in out.splitlines() if row.startswith(("│", "┃"))) <= 80
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "audit.html", "audit.json", "directions.pt", "plotly.min.js"
    ]  # fmt: skip
    assert exit_status([*line, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "removed" and record["components"]["mlp"]["in_blocks"] == "1-2"
    assert record["cosines"][0] > 0.999 and len(record["writers"]) == 11
    assert {**record, "format": 1} == json.loads((tmp_path / "files" / "audit.json").read_text())
    assert abs((torch.load(tmp_path / "files" / "directions.pt")[0] @ R.unit).item()) > 0.999


def test_the_status_is_0_whatever_the_verdict(pair, capsys):
    base, suspect = map(str, pair)
    assert exit_status(["audit", base, suspect]) == 0
    assert "verdict: other changes, and no direction was removed" in capsys.readouterr().out
    assert exit_status(["audit", base, base]) == 0
    assert "verdict: none" in capsys.readouterr().out


def test_what_weights_do_not_show_is_remarked(tmp_path):
    """A config that differs, and an adapter that names another base; with the same ones, nothing."""
    source = save_model("llama", tmp_path / "base")
    other = shutil.copytree(source, tmp_path / "other")
    assert audit(source, other).explain() == ["verdict: none (every weight is the same)"]
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"rms_norm_eps": 0.5, "transformers_version": "0"})
    (remark,) = audit(source, other).remarks
    assert remark == f"config differs, which is not judged: rms_norm_eps {config['rms_norm_eps']} → 0.5"
    export_adapter(source, Ablate(R), tmp_path / "adapter", verify="none")
    assert audit(source, tmp_path / "adapter", R).remarks == ()
    held = read_json(tmp_path / "adapter/adapter_config.json")
    write_json(tmp_path / "adapter/adapter_config.json", held | {"base_model_name_or_path": "somebody/else"})
    found = audit(source, tmp_path / "adapter", R)
    assert "the adapter says that it is of somebody/else" in found.explain()[-1] and found.verdict == "removed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["BASE", "nowhere"], "no such model"),
        (["SUSPECT"], "BASE is a llama of 10 blocks"),
        (["BASE", "SUSPECT", "--direction", "none.pt"], "no such direction"),
        (["BASE", "SUSPECT", "--directions", "0-2"], "name it with --direction"),
        (["BASE", "model.gguf"], "quantized file"),
        (["SUSPECT", "--revision", "main"], "say --suspect-revision"),
        (["BASE", "nowhere", "--output-dir", "model.gguf/out"], "cannot be written"),
        ([], "BASE"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    places = dict(zip(("BASE", "SUSPECT"), map(str, pair), strict=True))
    assert exit_status(["audit", *(places.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
