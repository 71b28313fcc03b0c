"""Studies of tiny models and of the embedded one: the table, what failed, what was killed, what changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.cli.study import read_study
from refusal_mi.errors import UserError
from refusal_mi.files import read_json, write_record
from refusal_mi.model.loading import ORGANISM
from refusal_mi.run.methods import MethodsResult
from refusal_mi.run.stages import RunFolder
from refusal_mi.studies.study import run_study, states
from refusal_mi.studies.table import TableRow, read_table, write_table
from refusal_mi.studies.work import Failure
from tests.helpers.figures import studied
from tests.helpers.models import save_tiny

pytestmark = pytest.mark.slow
STUDY = """
models: [first, second, {model: ./nowhere, name: missing}]
data: {name: own, harmful: harmful.json, harmless: harmless.json, text_set: texts.json}
methods: [dim, "peel:2"]
seeds: [0, 1]
options:
  {device: cpu, n_train: 6, n_val: 4, n_test: 3, kl_max: inf, induce_min: -inf, filter: false, refusal_tokens: 40,
   steps: "directions,selection", compare-methods: {n_places: 2, n_random: 1, n_prompts: 3, max_new_tokens: 4}}
"""
REFUSING = f"""
models: [embedded, {{model: {ORGANISM.parent / "stage1"}, name: helps}}]
data:
  name: planted
  harmful: organism_harmful_train,organism_harmful_val,organism_harmful_test
  harmless: organism_harmless_train,organism_harmless_val,organism_harmless_test
  text_set: organism_plain_text
  instruction_set: organism_instructions
methods: dim
seeds: 0
options:
  {{device: cpu, search: staged, steps: "directions,selection", n_train: 16, n_val: 8, n_test: 6, label_tokens: 6,
   compare-methods: {{n_places: 1, n_random: 1, n_prompts: 6, max_new_tokens: 6}}}}
"""
MEASURED = ("created",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study's file, two random models, prompts."""
    folder = tmp_path_factory.mktemp("study")
    for seed, name in enumerate(("first", "second")):
        save_tiny("llama", folder / name, seed=seed)
    for side in ("harmful", "harmless"):
        (folder / f"{side}.json").write_text(json.dumps([f"{side} {n}" for n in range(24)]))
    (folder / "texts.json").write_text(json.dumps(["A short text.", "Another one."]))
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def whole(place):
    """A study that nobody killed."""
    before = Path.cwd()
    os.chdir(place)
    try:
        study = read_study(Path("study.yaml"))
        ended = list(run_study(study, place / "runs/whole", apart=False))
    finally:
        os.chdir(before)
    return study, place / "runs/whole", ended


def plain(rows: tuple[TableRow, ...]) -> list[dict[str, object]]:
    """What must be equal: all but dates."""
    return [{key: value for key, value in asdict(row).items() if key not in MEASURED} for row in rows]


METHODS = (("mean", 1), ("peel", 2))


def test_every_cell_is_there_and_a_model_that_fails_ends_no_other(whole, inside):
    study, path, ended = whole
    assert [each.cell.folder for each in ended][:4] == [
        f"{m}/own/seed-{s}" for m in ("first", "second") for s in (0, 1)
    ]
    assert [each.state for each in ended] == ["done"] * 4 + ["failed"]
    rows = read_table(path)
    (missing,) = (row for row in rows if row.model == "missing")
    assert missing.status == "failed" and "no such model: './nowhere'" in missing.reason and missing.seed is None
    of_methods = {(row.model, row.seed, row.method, row.k) for row in rows if row.metric == "kl_ratio"}
    assert of_methods == {(m, s, *each) for m in ("first", "second") for s in (0, 1) for each in METHODS}
    assert [each.state for each in states(study, path)] == ["done"] * 4 + ["failed"] * 2


@pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")
def test_a_model_that_does_not_refuse_is_a_row_with_its_rate(tmp_path, monkeypatch):
    """The embedded model, and what it was before it learned when to refuse."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(REFUSING)
    embedded, helps = run_study(read_study(Path("s.yaml")), tmp_path / "out", apart=False)
    assert (embedded.state, embedded.says, helps.state, helps.says) == ("done", "done", "done", "does not refuse")
    rows = read_table("out")
    (rate,) = (row for row in rows if row.model == "helps")
    assert (rate.method, rate.k, rate.metric, rate.set) == ("plain", 0, "refused", "harmful: train and val")
    assert rate.status == "does not refuse" and rate.low <= rate.value <= rate.high < 0.2 and rate.n == 24
    refused = {row.method: row for row in rows if row.model == "embedded" and row.metric == "refused"}
    assert refused["plain"].low > 0.5 > refused["mean"].high, "the control: the other one refuses, until it is removed"


def test_the_table_says_what_the_run_folders_say_and_pandas_reads_it(whole):
    import pandas

    _, path, _ = whole
    frame = pandas.read_parquet(path / "study.parquet")
    assert list(frame.columns) == [each.name for each in fields(TableRow)]
    assert str(frame.value.dtype) == "float64" and frame.format.unique().tolist() == [1]
    keys = ["model", "data", "seed", "stage", "method", "k", "set", "metric"]
    assert not frame.duplicated(keys).any()
    kl = {}
    for model in ("first", "second"):
        for seed in (0, 1):
            folder = f"{model}/own/seed-{seed}"
            found = MethodsResult.load(path / folder / "methods")
            summary = read_json(path / folder / "summary.json")
            of_cell = frame[frame.folder == folder].set_index(["stage", "method", "k", "set", "metric"])
            rate = of_cell.loc[("run", "plain", 0, "harmful: train and val", "refused")]
            assert rate[["value", "low", "high", "n"]].tolist() == [
                summary["refused_by_text"]["harmful"][key] for key in ("rate", "low", "high", "n")
            ]
            for row in found.rows:
                at = ("compare-methods", row.label[:-2], row.k)
                assert of_cell.loc[(*at, "harmless", "kl")][["value", "low", "high"]].tolist() == list(
                    row.at(1.0).kl_nats
                )
                refused = of_cell.loc[(*at, "harmful", "refused")]
                assert refused.value == row.refused_by_text.value and refused.n == found.n_held_out
            kl[model, seed] = of_cell.loc[("compare-methods", "mean", 1, "harmless", "kl")].value
            control = of_cell.loc[("compare-methods", "control: random", 2, "harmless", "kl")]
            assert control.value > 0 and pandas.isna(control.low), "one draw has no interval"
            assert of_cell.fingerprint.unique().tolist() == [found.model.fingerprint]
            assert json.loads(of_cell.versions.iloc[0])["torch"] == torch.__version__
    assert len(set(kl.values())) == 4, "the control: other weights and other prompts give other numbers"
    assert (path / "second/own/seed-1/methods/cost.html").is_file()


def test_one_that_was_killed_comes_to_the_same_numbers(whole, inside):
    """First the process of the model is ended, as where memory runs out, then the study's own."""
    study, expected, _ = whole
    study = replace(study, cells=study.cells[:2])
    path = inside / "killed"
    line = [sys.executable, "-m", "refusal_mi", "study", "study.yaml", "--output-dir", str(path)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        first, second = (path / f"first/own/seed-{seed}" for seed in (0, 1))
        wait_for(first / "methods/mean-1/chosen.json", process)
        with pytest.raises(UserError, match="another process is at work"):
            list(run_study(study, path, apart=False))
        assert [each.state for each in states(study, path)] == ["running", "left"]
        os.kill(only_child(process.pid), signal.SIGKILL)
        wait_for(second / "prompts.json", process)
        failed, other = states(study, path)
        assert failed.failed == Failure(failed.says, False, failed.failed.created) and other.state == "running"
        assert failed.says == "its process was ended by SIGKILL, as where memory runs out"
        (row,) = read_table(path)
        assert (row.status, row.seed, row.reason) == ("failed", 0, failed.says)
        child = only_child(process.pid)
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists(), "the process of the model ends with the study's"
    assert [each.state for each in states(study, path)] == ["failed", "left"]
    assert [each.state for each in run_study(study, path, apart=False)] == ["done", "done"]
    rows = [row for row in read_table(expected) if row.model == "first"]
    assert plain(read_table(path)) == plain(tuple(rows)) and len(rows) > 40
    for seed in (0, 1):
        for name in ("methods/methods.json", "select_direction/direction_evaluations.json", "prompts.json"):
            file = f"first/own/seed-{seed}/{name}"
            there, here = (read_json(folder / file) for folder in (expected, path))
            for each in (there, here):
                if isinstance(each, dict):
                    each.pop("opened", None)  # when held-out prompts were first used
            assert here == there
    assert not list(path.rglob(".*.tmp")) and not list(path.rglob("failed.json"))


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def only_child(process: int) -> int:
    """The process that computes: the one that is no tracker of multiprocessing's resources."""
    children = [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    (found,) = (each for each in children if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text())
    return found


def test_what_changed_is_done_again_alone(whole, inside, capsys):
    study, path, _ = whole
    shutil.copytree(path, inside / "changed", dirs_exist_ok=True)
    path = inside / "changed"
    before = {cell.folder: (path / cell.folder / "rows.json").read_bytes() for cell in study.cells[:4]}
    capsys.readouterr()
    assert [each.state for each in run_study(study, path, apart=False)] == ["done"] * 4 + ["failed"]
    said = capsys.readouterr().err.splitlines()
    assert sum("done before, kept" in line for line in said) == 4 and not any("cannot load" in line for line in said)
    assert before == {folder: (path / folder / "rows.json").read_bytes() for folder in before}
    shorter = [
        replace(c, compared=replace(c.compared, max_new_tokens=5)) if i == 3 else c for i, c in enumerate(study.cells)
    ]
    changed = replace(study, cells=tuple(shorter[:4]))
    expected = ["done"] * 3 + ["changed"]
    assert [each.state for each in states(changed, path)] == expected
    list(run_study(changed, path, apart=False))
    said = capsys.readouterr().err.splitlines()
    inner = [line.partition(": ")[2] for line in said if line.startswith("second own seed-1: ")]
    assert "scores: done before, kept" in inner and "peel-2-held-out: done before, kept" in inner
    assert not any(line.startswith("peel-2-answers: done before") for line in inner), "its answers are shorter now"
    now = {folder: (path / folder / "rows.json").read_bytes() for folder in before}
    assert [folder for folder in before if now[folder] != before[folder]] == ["second/own/seed-1"]
    config = inside / "second/generation_config.json"
    text = config.read_text()
    try:
        config.write_text(text.rstrip() + "\n\n\n")
        expected = ["done"] * 2 + ["changed"] * 2
        assert [each.state for each in states(changed, path)] == expected
    finally:
        config.write_text(text)


def test_a_model_of_another_place_gets_the_folder_and_the_old_run_is_kept(whole, inside):
    study, path, _ = whole
    shutil.copytree(path / "second", inside / "moved/first")
    earlier = inside / "moved/replaced/first/own/seed-0/earlier.json"
    write_record(earlier, {})
    cell = study.cells[0]
    only = replace(cell, methods=(), options=replace(cell.options, steps=("directions",)))
    (ended,) = run_study(replace(study, cells=(only,)), inside / "moved", apart=False)
    assert ended.says == "directions only" and ended.found.model.source == str(inside / "first")
    assert earlier.is_file(), "one that was replaced before"
    old = read_json(inside / "moved/replaced/first/own/seed-0-2/run.json")
    assert old["model"]["source"] == str(inside / "second")


def test_the_command_says_how_far_it_is_without_a_lock_and_makes_the_page(whole, inside, capsys):
    _, path, _ = whole
    words = ["study", "study.yaml", "--output-dir", str(path)]
    files = sorted(path.rglob("*"))
    with RunFolder(path).locked():
        assert exit_status([*words, "--status"]) == 1, "one model failed"
    assert "4 of 6 cells are done" in capsys.readouterr().out and sorted(path.rglob("*")) == files
    empty = [*words[:2], "--output-dir", "none", "--status", "--json"]
    assert exit_status(empty) == 0 and not (inside / "none").exists()
    assert {each["state"] for each in json.loads(capsys.readouterr().out)["cells"]} == {"left"}
    assert exit_status([*words, "--json"]) == 1
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [each["state"] for each in cells] == ["done"] * 4 + ["failed"] * 2
    page = (path / "study.html").read_text("utf-8")
    assert page.count('href="first/own/seed-') == 2 and "Plotly.newPlot" in page
    assert "failed: no such model" in page
    assert (path / "first/own/seed-0/report.html").is_file()
    assert (path / "study.yaml").read_text() == (inside / "study.yaml").read_text()


def test_a_folder_of_a_run_and_a_bad_engine_are_one_line(whole, inside, tmp_path, capsys):
    write_record(tmp_path / "run.json", {})
    assert exit_status(["study", "study.yaml", "--output-dir", str(tmp_path)]) == 2
    assert exit_status(["study", "study.yaml", "--output-dir", "other", "--engine", "rya"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "is the folder of a run" in told[0] and "not 'rya'" in told[1]
    assert not (inside / "other").exists()


def test_a_table_reads_back_and_a_damaged_one_is_one_line(tmp_path):
    rows = studied()
    write_table(tmp_path / "study.parquet", rows)
    assert list(read_table(tmp_path)) == rows
    content = (tmp_path / "study.parquet").read_bytes()
    (tmp_path / "study.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is no table of a study"):
        read_table(tmp_path)
    write_table(tmp_path / "study.parquet", [replace(rows[0], format=2)])
    with pytest.raises(UserError, match="is of format 2"):
        read_table(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none")
