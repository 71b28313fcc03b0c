"""Studies whose cells are not computed: what they depend on, what is kept, what is said, what is drawn."""

import inspect
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.cli.study import read_study
from refusal_mi.figures.study import plot_study
from refusal_mi.files import read_record, write_record
from refusal_mi.studies import study as of_studies
from refusal_mi.studies.spec import StudyModel
from refusal_mi.studies.study import run_study, states
from refusal_mi.studies.table import CellRows
from refusal_mi.studies.work import ROWS, Apart, Failure, Here, Work
from tests.helpers.figures import studied
from tests.helpers.runs import make_model


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A study of a text, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def read(text: str):
        Path("s.yaml").write_text(text)
        return read_study(Path("s.yaml"))

    return read


@pytest.fixture
def at_once(monkeypatch):
    """Cells that are done at once, with what a run of nothing writes."""

    def do(self, cell):
        found = CellRows("done", cell.name, make_model(), {}, False, ())
        write_record(self.work.folder / cell.folder / ROWS, found)

    monkeypatch.setattr(Here, "do", do)


def test_what_auto_means_on_this_machine_is_an_input_and_so_is_who_judges(read, monkeypatch):
    auto, fixed = read(
        "models: [{model: a/b, name: auto}, {model: a/b, name: fixed, device: cpu, dtype: float32}]"
    ).cells
    (judged,) = read("options: {judge: 'classifier:here', judge_labels: 'A=comply,B=refuse'}").cells
    before = [each.inputs("x") for each in (auto, fixed)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    after = [each.inputs("x") for each in (auto, fixed)]
    assert before[0]["model"] != after[0]["model"] and before[1] == after[1], "the control: nothing is left to auto"
    monkeypatch.undo()
    Path("here").mkdir(exist_ok=True)
    (Path("here") / "config.json").write_text("{}")
    first = judged.inputs("x")["judge"]
    (Path("here") / "config.json").write_text('{"other": 1}')
    assert first is not None and first != judged.inputs("x")["judge"]


def test_no_two_cells_share_what_is_remembered_of_them(read, at_once):
    for name in ("one", "two"):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(name)
    study = read(
        "models: [{model: ./one, name: a}, {model: ./two, name: a--b}]\n"
        "data: [{name: b--c, harmful: harmful}, {name: c, harmful: harmful}]"
    )
    assert [each.state for each in run_study(study, Path("out"))] == ["done"] * 4
    assert [each.state for each in states(study, Path("out"))] == ["done"] * 4


def test_a_file_that_is_taken_away_while_states_are_read_is_no_error(read, monkeypatch):
    study = read("models: ./nowhere")
    marks = Path("out/running.json"), Path("out/nowhere/failed.json")
    for mark in marks:
        write_record(mark, Failure("no such model", True, ""))

    def read_late(path, kind):
        path.unlink(missing_ok=True)
        return read_record(path, kind)

    monkeypatch.setattr(of_studies, "read_record", read_late)
    assert [each.state for each in states(study, Path("out"))] == ["left"]


def test_the_file_that_was_read_is_kept_before_the_work_and_a_report_that_fails_ends_nothing(
    read, at_once, monkeypatch, capsys
):
    text = "models: ./one\ndata: [{name: a, harmful: harmful}, {name: b, harmful: harmful}]"
    Path("one").mkdir()
    (Path("one") / "config.json").write_text("one")
    read(text)
    kept = []

    def here(study, path, **how):
        assert how.pop("apart") is True, "the command gives each model its own process"
        for ended in run_study(study, path, **how):
            kept.append((path / "study.yaml").read_text())
            Path("s.yaml").write_text("seeds: [7, 8, 9]")
            yield ended

    def failing(folder):
        raise ValueError(f"{folder.parent.name} draws nothing")

    monkeypatch.setattr(of_studies, "run_study", here)
    monkeypatch.setattr("refusal_mi.report.page.write_report", failing)
    assert exit_status(["study", "s.yaml", "--output-dir", "out"]) == 0
    told = capsys.readouterr()
    assert kept == [text] * 2 and Path("out/study.yaml").read_text() == text
    assert "no report: a draws nothing" in told.err and "2 of 2 cells are done" in told.out


@pytest.mark.parametrize("words", [["--engine", "foo"], ["--workers", "3"], ["--images"], ["--fresh"]])
def test_what_status_would_pass_over_is_one_line(words, read, capsys):
    read("{}")
    assert exit_status(["study", "s.yaml", "--status", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "--status starts nothing" in lines[0]


def test_a_process_that_cannot_start_says_why_and_scripts_start_none(tmp_path, monkeypatch):
    def full(self):
        raise OSError("no room for a process")

    monkeypatch.setattr(SpawnProcess, "start", full)
    with Apart(Work(tmp_path, StudyModel("a", None))) as worker:
        failed = worker.load()
    assert failed is not None and failed.of_model and "no room for a process" in failed.reason
    assert inspect.signature(run_study).parameters["apart"].default is False


def test_a_run_without_methods_is_drawn_by_its_rate_on_harmful_prompts_alone():
    base = next(each for each in studied() if each.stage == "run")
    for status in ("done", "no candidate survives"):
        sides = [
            replace(base, status=status, set=f"{side}: train and val", value=value, low=value, high=value)
            for side, value in (("harmless", 0.02), ("harmful", 0.9))
        ]
        later = replace(sides[1], set="harmful: other", value=0.8)
        figure = plot_study([*sides, later])
        assert [list(each.x) for each in figure.data] == [[0.9]]
        assert figure.layout.xaxis.title.text == "harmful prompts refused, share"


def test_many_models_fit_below_each_other():
    base = next(each for each in studied() if each.stage == "run")
    figure = plot_study([replace(base, model=f"model {n}") for n in range(60)])
    assert len(figure.data) == 60
