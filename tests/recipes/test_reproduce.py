"""A run again: MATCH, or the first difference; in another folder, which leaves the run as it was."""

import json
import shutil

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.files import read_json

pytestmark = pytest.mark.slow
SIZES = ["--n-train=6", "--n-val=3", "--n-test=3", "--n-ce=3", "--max-new-tokens=3", "--refusal-tokens=5,40"]
RUN = ["--no-filter", "--no-thresholds", "--response-prefix=", "--device=cpu", "--seed=7", *SIZES]


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    assert exit_status(["run", str(tiny_dir("llama")), *RUN, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def again(folder, capsys, *words):
    capsys.readouterr()
    status = exit_status(["reproduce", str(folder), *words])
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_matches_itself_and_is_left_as_it_was(folder, capsys, tmp_path):
    before = contents(folder)
    status, shown, notes = again(folder, capsys)
    assert status == 0 and shown.startswith("MATCH: ") and "note:" not in notes
    assert contents(folder) == before
    kept = tmp_path / "kept"
    status, shown, _ = again(folder, capsys, "--output-dir", str(kept), "--json")
    found = json.loads(shown)
    assert status == 0 and found["matches"] and found["n_files"] > 15
    assert (kept / "direction.pt").read_bytes() == (folder / "direction.pt").read_bytes()
    assert again(folder, capsys, "--output-dir", str(kept))[0] == 2  # it is not empty any more


def change(path, key, value):
    held = read_json(path)
    rows = held
    for part in key[:-1]:
        rows = rows[part]
    rows[key[-1]] = value
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("file", "key", "said"),
    [
        ("select_direction/direction_evaluations.json", (2, "refusal_score"), "[2].refusal_score is 9.5 there"),
        ("completions/harmless_baseline_completions.json", (0, "response"), "[0].response is 9.5 there"),
        ("prompts.json", ("harmful", "train", 0, "instruction"), "harmful.train[0].instruction is 9.5 there"),
    ],
)
def test_a_changed_number_is_found_and_named(folder, capsys, file, key, said):
    change(folder / file, key, 9.5)
    status, shown, _ = again(folder, capsys)
    assert status == 1 and shown.startswith(f"DIFFERENT: {file} (stage ") and said in shown


def test_the_first_difference_is_the_one_of_the_earliest_stage(folder, capsys):
    change(folder / "completions/harmless_baseline_completions.json", (0, "response"), "x")
    held = torch.load(folder / "generate_directions/mean_diffs.pt", weights_only=True)
    torch.save(held + 0.5, folder / "generate_directions/mean_diffs.pt")
    status, shown, _ = again(folder, capsys)
    assert status == 1 and "mean_diffs.pt (stage " in shown and "differs by at most 0.5" in shown


def test_versions_are_notes_and_a_missing_file_is_a_difference(folder, capsys):
    change(folder / "run.json", ("versions", "torch"), "1.0")
    change(folder / "direction_metadata.json", ("versions", "torch"), "1.0")
    status, shown, notes = again(folder, capsys)
    assert status == 0 and "note: torch 1.0 there, " in notes and shown.startswith("MATCH")
    (folder / "direction.pt").unlink()
    assert "direction.pt (stage selection): there is no such file" in again(folder, capsys)[1]


def test_other_options_make_another_run(folder, capsys):
    change(folder / "run.json", ("options", "seed"), 8)
    status, shown, _ = again(folder, capsys)
    assert status == 1 and shown.startswith("DIFFERENT: ")


def test_what_cannot_be_run_again_is_one_line(folder, capsys):
    change(folder / "run.json", ("model", "fingerprint"), "held:abc")
    assert "held in memory" in again(folder, capsys)[2]
    change(folder / "run.json", ("model", "fingerprint"), "abc")
    status, shown, _ = again(folder, capsys)
    assert status == 1 and "the weights of llama are others" in shown
    (folder / "run.json").write_text('{"recipe": "response-averaged vector"}')
    assert again(folder, capsys)[0] == 2


def test_a_folder_of_a_combination_alone_matches_in_what_it_has(tiny_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["run", str(tiny_dir("llama")), *RUN, "--output-dir", str(folder), "--directions", "0-1"]
    assert exit_status(words) == 0 and not (folder / "summary.json").exists()
    status, shown, _ = again(folder, capsys)
    assert status == 0 and shown.startswith("MATCH: ") and "not repeated: 0-1" in shown.splitlines()
    change(folder / "select_direction/direction_evaluations.json", (2, "refusal_score"), 9.5)
    assert again(folder, capsys)[0] == 1
    shutil.rmtree(folder / ".stages")
    status, shown, _ = again(folder, capsys)
    assert status == 1 and "holds no stage of its run" in shown


def test_the_summary_is_compared_but_for_time_and_memory(folder, capsys):
    change(folder / "summary.json", ("seconds", "directions"), 1e6)
    change(folder / "summary.json", ("peak_mib",), 1e6)
    status, shown, _ = again(folder, capsys)
    assert status == 0 and "not repeated" not in shown
    change(folder / "summary.json", ("selection", "explanation"), "none")
    status, shown, _ = again(folder, capsys)
    assert status == 1 and shown.startswith("DIFFERENT: summary.json: selection.explanation is")


def test_what_is_not_repeated_is_named(folder, tiny_dir, capsys):
    words = ["run", str(tiny_dir("llama")), *RUN, "--output-dir", str(folder)]
    assert exit_status([*words, "--directions", "0-1"]) == 0
    (folder / "combos.json").write_text("{}")
    status, shown, _ = again(folder, capsys)
    assert status == 0 and shown.splitlines()[1:] == ["not repeated: 0-1, combos.json"]
    assert exit_status([*words, "--steps", "directions"]) == 0
    status, shown, _ = again(folder, capsys, "--json")
    found = json.loads(shown)
    assert status == 0 and found["n_files"] < 8
    assert {"0-1", "combos.json", "completions", "loss_evals", "direction.pt"} <= set(found["not_repeated"])
    assert not {"prompts.json", "generate_directions"} & set(found["not_repeated"])
