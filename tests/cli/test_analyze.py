"""`refusal-mi analyze` on a run folder: files, figures, and what it refuses."""

import json

import pytest

from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.files import write_json, write_record, write_tensors
from refusal_mi.run.record import GridRecord
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import HARMFUL, HARMLESS, TOKENS, grid_of
from tests.helpers.runs import write_head


@pytest.fixture(scope="module")
def run_folder(tiny_dir, tiny_model, tmp_path_factory):
    """What `analyze` reads of a finished run of the tiny llama."""
    folder, model = tmp_path_factory.mktemp("run"), tiny_model("llama")
    grid = grid_of(model, ChatFormat(model.tokenizer))
    grid.direction(-2, 3).save(folder / "direction.pt")
    write_tensors(folder / "generate_directions/mean_diffs.pt", grid.vectors)
    norms = tuple(map(tuple, grid.vectors.norm(dim=-1).tolist()))
    degenerate = tuple(map(tuple, grid.is_degenerate))
    record = GridRecord("difference in means", grid.positions, norms, len(HARMFUL), len(HARMLESS), degenerate)
    write_record(folder / "generate_directions/mean_diffs.json", record)
    sides = {"harmful": HARMFUL, "harmless": HARMLESS}
    write_head(folder, model, str(tiny_dir("llama").resolve()), sides, TOKENS)
    answers = [{"prompt": HARMFUL[1], "response": "I'm sorry", "category": None}]
    write_json(folder / "completions/harmful_baseline_completions.json", answers)
    return folder


@pytest.mark.slow
def test_analyze_writes_results_and_figures(tiny_dir, run_folder, tmp_path, capsys):
    what = "lens,projections,token_map,geometry,comparison,pca,logits,weights"
    arguments = ["analyze", str(tiny_dir("llama")), "--run", str(run_folder), "--what", what, "--n-prompts", "4"]
    assert exit_status([*arguments, "--output_dir", str(tmp_path), "--device", "cpu", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert list(written) == what.split(",")
    assert {path.name for path in tmp_path.glob("*.html")} >= {f"{kind}.html" for kind in written}
    pca = load_result(tmp_path / "pca.json")
    assert pca.position == -2 and pca.layers == (0, 3, 5)
    assert pca.prompts[:2] == HARMFUL[1:3], "prompts that did not pass the filter are left out"
    assert pca.outcomes[:2] == ("refused", None)
    assert load_result(tmp_path / "projections.json").direction_layer == 3


def test_one_analysis_that_cannot_be_done_does_not_stop_the_others(tiny_dir, run_folder, tmp_path, capsys, monkeypatch):
    def refuse(run):
        raise UserError("not here")

    monkeypatch.setattr("refusal_mi.analysis.lens.from_run", refuse)
    model, output = str(tiny_dir("llama")), str(tmp_path)
    shared = ["analyze", model, "--run", str(run_folder), "--n-prompts", "3", "--output-dir", output, "--device", "cpu"]
    assert exit_status([*shared, "--what", "lens,logits", "--json"]) == 1
    answer = capsys.readouterr()
    assert "no lens: not here" in answer.err and list(json.loads(answer.out)) == ["logits"]
    assert not (tmp_path / "lens.json").exists() and (tmp_path / "logits.html").exists()
    assert exit_status([*shared, "--what", "lens"]) == 2


@pytest.mark.slow
def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_drawn(tiny_model, tmp_path, capsys):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    patch_activations(model, chat, HARMFUL[:2], HARMLESS[:2], TOKENS, sites=["attn"], layers=[1, 3]).save(
        tmp_path / "patching.json"
    )
    assert exit_status(["plot", str(tmp_path / "patching.json")]) == 0
    error = capsys.readouterr().err
    assert "no figure patching_heads" in error and "no figure patching_directional" in error
    assert {path.name for path in tmp_path.glob("*.html")} == {"patching.html"}
    assert exit_status(["plot", str(tmp_path / "patching.json"), "--output-dir", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "files": [str(tmp_path / "b" / name) for name in ("patching.html", "plotly.min.js")]
    }
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["patching.html", "plotly.min.js"]
    assert exit_status(["plot", str(tmp_path / "patching.pt"), "--output", str(tmp_path / "main.html")]) == 0
    assert "Plotly.newPlot" in (tmp_path / "main.html").read_text()
    with pytest.warns(UserWarning, match="no figure patching_heads: .*sites that include heads"):
        assert list(figures(load_result(tmp_path / "patching.json"))) == ["patching"]


def test_analyze_refuses_what_it_cannot_do(tiny_dir, run_folder, tmp_path, capsys):
    model = str(tiny_dir("llama"))
    assert exit_status(["analyze", model, "--run", str(run_folder), "--what", "lense"]) == 2
    assert "not 'lense'; did you mean lens?" in capsys.readouterr().err
    assert exit_status(["analyze", model, "--run", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert exit_status(["analyze", str(tiny_dir("gpt2")), "--run", str(run_folder)]) == 2
    assert "holds a run of" in capsys.readouterr().err


def test_what_was_found_is_printed_before_the_paths(tiny_dir, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["analyze", str(tiny_dir("llama")), "--run", str(run_folder), "--what", "logits,weights"]
    assert exit_status([*words, "--n-prompts", "3", "--output-dir", str(tmp_path), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    logits, weights = (load_result(tmp_path / f"{kind}.json") for kind in ("logits", "weights"))
    for row in (*logits.findings(), *weights.findings()):
        for text in (row.name, row.value, row.least, row.most):
            assert text in shown
    assert shown.index("┃ logits") < shown.index("┃ weights") < shown.index(str(tmp_path / "logits.json"))
    assert str(tmp_path / "weights.html") in shown
