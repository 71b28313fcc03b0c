"""Nothing is skipped silently, nothing half-written looks finished, nothing is overwritten unasked."""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from refusal_mi.errors import UserError
from refusal_mi.export import export as export_module
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_checkpoint
from refusal_mi.export.plan import plan_export
from refusal_mi.export.rewrite import rewrite
from refusal_mi.interventions import Ablate
from refusal_mi.weights import TensorEdit, edit_, factors, writer_projection
from tests.helpers.directions import random_direction
from tests.helpers.exports import hooked_logits, plain_logits, save_model
from tests.helpers.models import tiny_hf_model

R = random_direction(1)


def _change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors", {"format": "pt"})


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors | {"model.layers.0.mlp.extra_proj.weight": torch.zeros(32, 4)}, "fits no class"),
        (lambda tensors: tensors | {"model.layers.5.mlp.down_proj.weight": torch.zeros(32, 48)}, "block 5"),
        (lambda tensors: tensors | {"model.layers.0.mlp.shared_expert.down_proj.weight": torch.ones(32, 8)}, "mlp"),
        (_without("model.layers.3.mlp.down_proj.weight"), "block 3"),
        (_without("lm_head.weight"), "head"),
    ],
)
def test_a_checkpoint_whose_writers_are_not_known_is_refused(change, message, tmp_path):
    source = save_model("qwen2", tmp_path / "source")
    plan_export(source, Ablate(R))
    _change_tensors(source, change)
    with pytest.raises(UserError, match=message):
        export_checkpoint(source, Ablate(R), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused(tmp_path):
    source = save_model("qwen2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises(UserError, match="no export for model type 'bloom'"):
        export_checkpoint(source, Ablate(R), tmp_path / "out")


@pytest.mark.parametrize(
    "quantization, name",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(quantization, name, tmp_path):
    source = save_model("qwen2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UserError, match=name):
        export_checkpoint(source, Ablate(R), tmp_path / "out")


def test_eight_bit_tensors_are_refused_where_the_config_is_silent(tmp_path):
    source = save_model("qwen2", tmp_path / "source")
    name = "model.layers.0.mlp.down_proj.weight"
    _change_tensors(source, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="F8_E4M3"):
        export_checkpoint(source, Ablate(R), tmp_path / "out")


def test_a_cut_off_checkpoint_is_refused(tmp_path):
    source = save_model("qwen2", tmp_path / "source")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="not complete"):
        export_checkpoint(source, Ablate(R), tmp_path / "out")


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path, tiny_dir, monkeypatch):
    def killed(*arguments, **options):
        rewrite(*arguments, **options)
        (unfinished,) = tmp_path.iterdir()  # what would be left of a process that is ended without a chance to clean up
        assert unfinished.name.startswith(".out.") and unfinished.name.endswith(".tmp")
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_goes_at_the_next(tmp_path, tiny_dir):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".out.{platform.node()}-{dead.pid}.0123abcd.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("n_renames", [1, 2])
def test_force_that_is_killed_loses_no_export(n_renames, tmp_path, tiny_dir, monkeypatch):
    """Killed after it has moved the old export away, and after it has put the new one in its place."""
    export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none")
    (tmp_path / "out/note.txt").write_text("old")
    rename, done = Path.rename, []

    def killed(self, target):
        done.append(rename(self, target))
        if len(done) == n_renames:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none", force=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--force"):
        export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none")
    assert (tmp_path / "out/note.txt").exists() == (n_renames == 1)
    export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", verify="none", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out/note.txt").exists()


def test_an_existing_directory_is_replaced_only_by_force_and_the_source_never(tmp_path, tiny_dir):
    source, out = tiny_dir("qwen2"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(UserError, match=r"no export of this program .* not replaced"):
            export_checkpoint(source, Ablate(R), out, verify="none", force=force)
    assert (out / "mine.txt").read_text() == "precious"
    with pytest.raises(UserError, match="source"):
        export_checkpoint(source, Ablate(R), source, force=True)
    (out / "mine.txt").unlink()
    export_checkpoint(source, Ablate(R), out, verify="none", force=True)
    (out / "old.txt").write_text("of the export before")
    with pytest.raises(UserError, match="--force"):
        export_checkpoint(source, Ablate(R), out, verify="none")
    assert (out / "old.txt").exists()
    export_checkpoint(source, Ablate(R), out, verify="none", force=True)
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link to an export", "link to nothing"])
def test_a_file_or_a_link_is_never_replaced(kind, tmp_path, tiny_dir):
    source, out, export = tiny_dir("qwen2"), tmp_path / "out", tmp_path / "export"
    export_checkpoint(source, Ablate(R), export, verify="none")
    if kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(export if kind == "link to an export" else tmp_path / "gone")
    before = sorted(path.name for path in export.iterdir())
    with pytest.raises(UserError, match=r"not replaced|is a link"):
        export_checkpoint(source, Ablate(R), out, verify="none", force=True)
    assert out.is_symlink() or out.read_text() == "precious"
    assert sorted(path.name for path in export.iterdir()) == before and not (tmp_path / "gone").exists()


def test_an_export_beyond_the_limits_is_kept_and_marked(tmp_path, tiny_dir, monkeypatch):
    def wrong(source, target, edits, **options):
        return rewrite(source, target, dict(list(edits.items())[:-1]), **options)

    monkeypatch.setattr(export_module, "rewrite", wrong)
    report = export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", prompts=["Count to ten"])
    assert report.is_verified is False
    assert (tmp_path / "out" / "UNVERIFIED").is_file()
    record = json.loads((tmp_path / "out" / "refusal_mi.json").read_text())
    assert record["verification"]["passed"] is False
    assert "BEYOND" in (tmp_path / "out" / "README.md").read_text()


def _sharded(directory):
    model = tiny_hf_model("qwen2")
    model.save_pretrained(directory, max_shard_size="60KB")
    path = directory / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    """Its tensors would be read from one place and edited in another, or not at all."""
    path, index = _sharded(tmp_path / "source")
    plan_export(tmp_path / "source", Ablate(R))
    places = index["weight_map"]
    name, shard = next(iter(places.items()))
    other = next(place for place in places.values() if place != shard)
    for wrong, message in ((places | {name: other}, "disagree"), (places | {name: f"sub/{shard}"}, "not a file")):
        path.write_text(json.dumps({**index, "weight_map": wrong}))
        with pytest.raises(UserError, match=message):
            plan_export(tmp_path / "source", Ablate(R))


def test_a_damaged_index_and_a_damaged_header_are_one_line(tmp_path):
    path, index = _sharded(tmp_path / "source")
    path.write_text(json.dumps({"metadata": index["metadata"]}))
    with pytest.raises(UserError, match="weight_map"):
        open_checkpoint(tmp_path / "source")
    text = json.dumps({"a": {"shape": [1]}}).encode()
    (tmp_path / "source" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="no safetensors header"):
        open_checkpoint(tmp_path / "source")


def test_of_a_single_file_and_shards_the_single_file_is_exported_as_it_is_loaded(tmp_path):
    source = tmp_path / "source"
    _sharded(source)
    save_model("qwen2", tmp_path / "other", seed=1)
    (source / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    report = export_checkpoint(source, Ablate(R), tmp_path / "out", verify="none")
    assert (plain_logits(source) - plain_logits(tmp_path / "other")).abs().max() == 0
    assert (plain_logits(tmp_path / "out") - hooked_logits(tmp_path / "other", [Ablate(R)])).abs().max() <= 1e-5
    assert "model.safetensors.index.json" in report.left_behind
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_card_loads_nothing_that_a_file_is_called(tmp_path):
    name = "![x](http:\\\\evil.example\\p.png)<img src=x>.bin"
    save_model("qwen2", tmp_path / "source")
    (tmp_path / "source" / name).write_bytes(b"old weights")
    report = export_checkpoint(tmp_path / "source", Ablate(R), tmp_path / "out", verify="none")
    card = (tmp_path / "out" / "README.md").read_text()
    assert name in report.left_behind and name in card.replace("\u2060", "")
    kinds = [
        {each.type for token in MarkdownIt().parse(text) for each in token.children or []} for text in (card, name)
    ]
    assert not kinds[0] & {"image", "html_inline"} and kinds[1] >= {"image", "html_inline"}


def test_an_export_of_an_export_keeps_the_earlier_records_apart(tmp_path, monkeypatch):
    def wrong(source, target, edits, **options):
        return rewrite(source, target, dict(list(edits.items())[:-1]), **options)

    source = save_model("qwen2", tmp_path / "a")
    (source / "README.md").write_text("the first card")
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "rewrite", wrong)
        export_checkpoint(source, Ablate(R), tmp_path / "b", prompts=["Count to ten"], verify="streaming")
    export_checkpoint(tmp_path / "b", Ablate(R, strength=0.0), tmp_path / "c", verify="none")
    out = tmp_path / "c"
    assert not (out / "UNVERIFIED").exists()
    assert (out / "UNVERIFIED.source").is_file()
    assert (out / "README.source.source.md").read_text() == "the first card"
    assert json.loads((out / "refusal_mi.source.json").read_text())["verification"]["passed"] is False
    assert json.loads((out / "refusal_mi.json").read_text())["verification"] is None
    assert str(tmp_path / "b") in (out / "README.md").read_text()


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, tiny_dir, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "file" / "out", verify="none")
    source = save_model("qwen2", tmp_path / "source")
    before = sorted(source.iterdir())
    for inside in (source / "out", tmp_path):
        with pytest.raises(UserError, match="lies in the other"):
            export_checkpoint(source, Ablate(R), inside, verify="none", force=True)
    assert sorted(source.iterdir()) == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="the folder you are in"):
        export_checkpoint(source, Ablate(R), ".", verify="none", force=True)


def test_an_edit_that_finds_no_tensor_is_never_passed_over(tmp_path, tiny_dir):
    checkpoint, edits = open_checkpoint(tiny_dir("qwen2")), plan_export(tiny_dir("qwen2"), Ablate(R)).edits
    with pytest.raises(AssertionError, match="nowhere"):
        rewrite(checkpoint, tmp_path, {**edits, "nowhere": next(iter(edits.values()))})


def test_the_record_says_what_was_done(tmp_path, tiny_dir):
    report = export_checkpoint(tiny_dir("gemma"), Ablate(R), tmp_path / "out", prompts=["Count to ten"])
    record = json.loads((tmp_path / "out" / "refusal_mi.json").read_text())
    assert set(record["edited_tensors"]) == set(report.figures)
    assert all(0 < row["removed"] < 1 for row in record["edited_tensors"].values())
    direction = record["interventions"][0]["directions"][0]
    assert direction["layer"] == 2
    assert direction["sha256"] == hashlib.sha256(R.vector.double().numpy().tobytes()).hexdigest()
    assert record["untied_head_bytes"] == 275 * 32 * 4
    assert record["verification"]["passed"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--keep-tied" in card
    assert "How to undo it" in card
    assert not (tmp_path / "out" / "UNVERIFIED").exists()


def test_rescaling_rows_afterwards_puts_the_direction_back():
    """Why the edit never does: the residual is 0 before and not after."""
    weight = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = random_direction(1, width=16).unit
    before = weight.norm(dim=1, keepdim=True)
    edit_(weight, TensorEdit(0, (writer_projection(unit[None]),)))
    assert (unit @ weight).norm() < 1e-12
    assert (unit @ (weight * before / weight.norm(dim=1, keepdim=True))).norm() > 1e-2


@pytest.mark.parametrize("strength", (1.0, 0.3))
def test_a_gain_is_divided_out_and_multiplied_back(strength):
    """W' = G^-1 (1 - s Q^T Q) G W, worked out with dense matrices; tiny gains keep their rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64, generator=generator)).Q.T
    gain = 1 + 0.3 * torch.randn(16, dtype=torch.float64, generator=generator)
    kept = torch.eye(16, dtype=torch.float64) - strength * basis.T @ basis
    edited = weight.clone()
    edit_(edited, TensorEdit(0, (writer_projection(basis, strength, gain),)))
    torch.testing.assert_close(edited, torch.diag(1 / gain) @ kept @ torch.diag(gain) @ weight)

    gain[5] = 0
    edit = TensorEdit(0, (writer_projection(basis, 1.0, gain),))
    edited = weight.clone()
    edit_(edited, edit)
    assert (basis @ torch.diag(gain) @ edited).abs().max() < 1e-12
    assert torch.equal(edited[5], weight[5])
    left, right = factors(weight, edit)
    torch.testing.assert_close(weight + left @ right, edited)


def test_an_open_checkpoint_reads_what_safetensors_reads(tiny_dir):
    checkpoint = open_checkpoint(tiny_dir("gpt_oss"))
    expected = load_file(tiny_dir("gpt_oss") / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())
