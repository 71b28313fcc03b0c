"""`refusal-mi export` and `export-vector`: options, messages, exit status."""

import json
from pathlib import Path

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.export import export as export_module
from refusal_mi.export.rewrite import rewrite
from refusal_mi.files import write_json, write_tensors
from refusal_mi.interventions import Ablate
from tests.helpers.directions import random_direction
from tests.helpers.exports import hooked_logits, plain_logits
from tests.helpers.runs import write_span

R = random_direction(1)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """The part of a finished run that an export reads."""
    folder = tmp_path / "run"
    R.save(folder / "direction.pt")
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 5, 32, generator=generator, dtype=torch.float64)
    write_tensors(folder / "generate_directions" / "means.pt", {"harmful": means + 1, "harmless": means})
    write_json(folder / "run.json", {"model": {}})
    return folder


def test_export_writes_a_verified_checkpoint(tmp_path, tiny_dir, run_folder, capsys):
    source = str(tiny_dir("qwen2"))
    options = ["--direction", str(run_folder), "--output-dir", str(tmp_path / "out")]
    assert exit_status(["export", source, *options]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    hooked = hooked_logits(source, [Ablate(R)])
    assert (plain_logits(tmp_path / "out") - hooked).abs().max() <= 1e-5
    assert exit_status(["export", source, *options]) == 2
    assert "--force" in capsys.readouterr().err


def test_options_reach_the_intervention(tmp_path, tiny_dir, run_folder, capsys):
    source = str(tiny_dir("qwen2"))
    base = ["export", source, "--direction", str(run_folder / "direction.pt"), "--verify", "none", "--json"]
    partial = ["--strength", "0.5", "--layers", "1:3", "--components", "attn,mlp"]
    assert exit_status([*base, *partial, "--output-dir", str(tmp_path / "part")]) == 0
    what = Ablate(R, strength=0.5, layers=range(1, 3), components=["attn", "mlp"])
    assert (plain_logits(tmp_path / "part") - hooked_logits(source, [what])).abs().max() <= 1e-5
    record = json.loads(capsys.readouterr().out)
    assert record["interventions"][0]["layers"] == [1, 2]

    assert exit_status([*base, "--affine", "harmless-mean", "--output-dir", str(tmp_path / "affine")]) == 0
    constant = json.loads(capsys.readouterr().out)["interventions"][0]["constants"][0]
    means = torch.load(run_folder / "generate_directions" / "means.pt")["harmless"]
    assert constant == pytest.approx((means[-1, 2] @ R.unit).item())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layers", "x"], "3:8"),
        (["--layers", "3:1"], "counts down"),
        (["--components", "attn,head"], "'head'"),
        (["--verify", "maybe"], "--verify"),
        (["--dtype", "int4"], "--stored-dtype"),
        (["--affine", "mean"], "harmless-mean"),
        (["--add", "1", "--strength", "0.5"], "--add"),
        (["--add", "1"], "nothing carries"),
        (["--direction", "nowhere"], "no such direction"),
        (["--directions", "0-2"], "no run"),
        (["--adapter", "--keep-tied"], "--keep-tied"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options, message, tmp_path, tiny_dir, run_folder, capsys):
    given = ["--direction", str(run_folder)] if "--direction" not in options else []
    arguments = ["export", str(tiny_dir("qwen2")), *given, "--output-dir", str(tmp_path / "out"), *options]
    assert exit_status(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_combination_is_exported_by_its_run_and_one_after_the_other_by_none(tmp_path, tiny_dir, run_folder, capsys):
    """Neither its folder nor its file of directions is taken; what the folder says is why."""
    source, out = str(tiny_dir("qwen2")), str(tmp_path / "out")
    capsys.readouterr()
    for multi, label, message in (("sequential", "0-2-sequential", "hooks can do"), ("span", "0-2", "export it with")):
        write_span(run_folder / label, (0, 2), multi, [1.0, 1.0])
        write_tensors(run_folder / label / "directions.pt", [R.vector, R.vector])
        for given in (run_folder / label, run_folder / label / "directions.pt"):
            for command, option in (("export", "--output-dir"), ("export-vector", "--output")):
                assert exit_status([command, source, "--direction", str(given), option, out]) == 2
                error = capsys.readouterr().err
                assert message in error and error.count("\n") == 1
                assert f"--direction {run_folder} --directions 0-2" in error
    assert exit_status(["export", source, "--multi", "sequential", "--output-dir", out]) == 2
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_is_status_1_and_kept(tmp_path, tiny_dir, run_folder, monkeypatch, capsys):
    def wrong(source, target, edits, **options):
        return rewrite(source, target, dict(list(edits.items())[:-1]), **options)

    monkeypatch.setattr(export_module, "rewrite", wrong)
    arguments = ["export", str(tiny_dir("qwen2")), "--direction", str(run_folder), "--output-dir", str(tmp_path / "o")]
    assert exit_status(arguments) == 1
    assert (tmp_path / "o" / "UNVERIFIED").is_file()
    assert "NO" in capsys.readouterr().out


def test_export_vector_writes_both_formats(tmp_path, tiny_dir, run_folder, capsys):
    base = ["export-vector", str(tiny_dir("qwen2")), "--direction", str(run_folder)]
    assert exit_status([*base, "--format", "lm-eval", "--output", str(tmp_path / "steer.pt")]) == 0
    entries = torch.load(tmp_path / "steer.pt")
    assert "layers.4.self_attn.o_proj" in entries
    assert {entry["action"] for entry in entries.values()} == {"clamp"}
    capsys.readouterr()
    again = ["--format", "lm-eval", "--output", str(tmp_path / "again.pt")]
    for options, kind in (([], "ablate"), (["--add", "-2"], "add")):
        assert exit_status([*base, *again, *options, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["path"], said["format"]) == (str(tmp_path / "again.pt"), "lm-eval")
        (step,) = said["interventions"]
        assert step["kind"] == kind and step["directions"][0]["layer"] == 2
        assert step.get("coefficient") == (-2 if options else None)
    assert exit_status([*base, "--format", "onnx", "--output", str(tmp_path / "x")]) == 2
    pytest.importorskip("gguf")
    from tests.helpers.exports import read_gguf

    assert exit_status([*base, "--output", str(tmp_path / "r.gguf")]) == 0
    torch.testing.assert_close(read_gguf(tmp_path / "r.gguf")[2], R.vector)
