"""Ctrl-C in the middle of each recipe: status 130, what was finished stays, the next call goes on from there."""

import json
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.files import read_json
from refusal_mi.recipes import arms, effects
from refusal_mi.recipes import caa_eval as caa_ab
from refusal_mi.recipes import caa_open as caa_answers
from refusal_mi.recipes import responses as alpaca
from refusal_mi.recipes import responses_eval as alpaca_measures

pytestmark = pytest.mark.slow

SIZES = ["--n-train=6", "--n-val=3", "--n-test=3", "--n-ce=2", "--max-new-tokens=3", "--n-random=0"]
RUN = ["--no-filter", "--no-thresholds", "--refusal-tokens=5,40", "--response-prefix=", "--device=cpu", *SIZES]
QUERIES = [f"Say the number {n}" for n in range(16)]


class Interrupted:
    """A function that raises KeyboardInterrupt at its n-th call, and after that does its work."""

    def __init__(self, work, at: int) -> None:
        self.work, self.at, self.n_calls = work, at, 0

    def __call__(self, *arguments, **options):
        self.n_calls += 1
        if self.n_calls == self.at:
            raise KeyboardInterrupt
        return self.work(*arguments, **options)


@pytest.fixture
def interrupt(monkeypatch, capsys):
    """Run a command that is interrupted at the n-th call of a function, then again; return what each run said."""

    def twice(arguments, module, name, at) -> tuple[str, str, set[Path]]:
        monkeypatch.setattr(module, name, Interrupted(getattr(module, name), at))
        assert exit_status(arguments) == 130
        first = capsys.readouterr().err
        assert "interrupted; finished stages are kept" in first and "Traceback" not in first
        there = {path for path in Path(".").rglob("*") if path.is_file()}
        assert not [path for path in there if path.suffix == ".tmp"]
        for path in there:
            if path.suffix == ".json":
                json.loads(path.read_text())
        before = {path: path.stat().st_mtime_ns for path in there}
        assert exit_status(arguments) == 0
        kept = {path for path, then in before.items() if path.exists() and path.stat().st_mtime_ns == then}
        return first, capsys.readouterr().err, kept

    return twice


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.json").write_text(json.dumps(QUERIES))
    pairs = [
        {
            "question": f"Is {'x' * n} a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes.",
            "answer_matching_behavior": "(A)" if n % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if n % 2 else "(A)",
        }
        for n in range(8)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return tmp_path


def test_run_and_combos(interrupt, place, tiny_dir):
    model = str(tiny_dir("gpt2"))
    arguments = ["run", model, *RUN, "--output-dir", "run"]
    _, second, kept = interrupt(arguments, effects, "ce_loss", 4)
    for stage in ("prompts", "directions", "scores", "selection", "completions_harmful_baseline", "loss_baseline"):
        assert f"{stage}: done before, kept" in second
    assert Path("run/loss_evals/baseline_loss_eval.json") in kept
    assert read_json(Path("run/summary.json"))["status"] == "done"
    options = ["--ranks", "0..2", "--kl-max", "inf", "--n-random", "0", "--n-ce", "2", "--val-new-tokens", "2"]
    arguments = ["combos", model, *options, "--output-dir", "run"]
    _, second, kept = interrupt(arguments, arms, "generate", 3)
    assert "combos_0: done before, kept" in second and "combos_1: done before, kept" not in second
    assert Path("run/combos/0.json") in kept and Path("run/combos/1.json") not in kept
    assert read_json(Path("run/combos.json"))["status"] == "done"


def test_a_response_averaged_vector_and_its_evaluation(interrupt, place, tiny_dir, monkeypatch):
    model = ["--model_path", str(tiny_dir("gpt2")), "--dataset", "queries.json", "--device", "cpu"]
    monkeypatch.setattr(alpaca, "did_as_asked", lambda rows, tokens, *_: [bool(entry.token_ids) for entry in tokens])
    sizes = ["--n_samples", "2", "--n_completions", "2", "--max_new_tokens", "4", "--output-dir", "v"]
    _, second, kept = interrupt(["vector", *model, *sizes], alpaca, "combine_spans", 1)
    assert "responses: done before, kept" in second
    assert {Path("v/compliant_responses.json"), Path("v/refusal_responses.json")} <= kept
    sizes = ["--n_validation_samples", "3", "--n_test_samples", "3", "--max_new_tokens", "3", "--layer", "2"]
    arguments = ["vector-eval", *model, *sizes, "--vector-dir", "v", "--refusal-tokens", "10", "--n-random", "0"]
    arguments += ["--coefficients", "0.0", "1.0"]
    monkeypatch.setattr("refusal_mi.recipes.responses_eval.is_degenerate", lambda _: False)
    _, second, kept = interrupt(arguments, alpaca_measures, "generate", 3)
    for stage in ("eval_layers", "eval_coeff_0.0"):
        assert f"{stage}: done before, kept" in second
    assert Path("v/layer_selection_scores.json") in kept and Path("v/eval_completions_coeff_0.0.json") in kept
    assert read_json(Path("v/eval_summary.json"))["status"] == "done"


def test_caa(interrupt, place, tiny_dir, monkeypatch):
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--output-dir", "caa"]
    arguments = ["caa", "vectors", *model, "--pairs", "pairs.json", "--layers", "1", "2"]
    monkeypatch.setattr("refusal_mi.recipes.caa.combine_spans", Interrupted(_combine(), 1))
    assert exit_status(arguments) == 130 and not Path("caa").exists()
    assert exit_status(arguments) == 0
    options = ["--vector", "caa", "--pairs", "pairs.json", "--multipliers", "-1", "1", "--n-questions", "0"]
    _, _, kept = interrupt(["caa", "ab", *model, *options], caa_ab, "p_matching", 3)
    assert Path("caa/results_layer=1_multiplier=-1.0_type=ab.json") in kept
    assert len(read_json(Path("caa/ab_results.json"))["rows"]) == 4
    options = ["--vector", "caa", "--layer", "1", "--multipliers", "1", "2", "--questions", "queries.json"]
    arguments = ["caa", "test", *model, *options, "--n-questions", "2", "--max-new-tokens", "3"]
    _, second, kept = interrupt(arguments, caa_answers, "generate", 4)
    assert "test_x1: done before, kept" in second and Path("caa/test_results_x1.json") in kept
    assert set(read_json(Path("caa/test_summary.json"))["by_multiplier"]) == {"1", "2"}


def _combine():
    from refusal_mi.reading import combine_spans

    return combine_spans


def test_results_of_other_weights_are_not_used(place, tiny_dir, capsys):
    """A model directory whose weights change after the vectors were made: one line, nothing is computed with them."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_dir("gpt2"), "model")
    made = ["caa", "vectors", "model", "--pairs", "pairs.json", "--layers", "1", "--output-dir", "caa", "--device=cpu"]
    assert exit_status(made) == 0
    assert exit_status(["run", "model", *RUN, "--steps", "directions,selection", "--output-dir", "run"]) == 0
    chat = ["chat", "model", "--ablate", "0", "--prompt", "Hi", "--max-new-tokens", "2", "--output-dir", "run"]
    test = ["caa", "test", "model", "--vector", "caa", "--questions", "queries.json", "--n-questions", "1"]
    test += ["--multipliers", "1", "--max-new-tokens", "2", "--output-dir", "out"]
    for arguments in (chat, test):
        assert exit_status(arguments) == 0
    weights = load_file("model/model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 2)
    save_file({**weights, name: weights[name] + torch.ones(1)}, "model/model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for arguments in (chat, test):
        assert exit_status(arguments) == 2
        assert "other weights" in capsys.readouterr().err
