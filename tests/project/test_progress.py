"""Progress: all items come through, short work is silent in a log, and a notebook keeps no empty output."""

import sys
from pathlib import Path
from typing import Any

import pytest

from refusal_mi.progress import track

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

SHORT = "from refusal_mi import progress\nfor _ in progress.track(range(3), 'short'): pass"
LONG = """
progress.QUIET_SECONDS = progress.REFRESH_SECONDS = 0
for _ in progress.track(range(3), 'first'): pass
print('between')
for _ in progress.track(iter('ab'), 'second', total=2): pass
"""
LOAD = """
from refusal_mi import load_model
model = load_model()
from transformers.utils import logging
print(logging.is_progress_bar_enabled())
"""
EXPORT = """
from refusal_mi import Ablate, Direction, export_checkpoint
change = Ablate(Direction.of([1.0] * model.cfg.d_model, layer=2))
print(export_checkpoint(None, change, "out").is_verified)
"""
THEIRS = """
import warnings
from transformers import AutoModelForCausalLM
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _ = AutoModelForCausalLM.from_pretrained("out")
"""


def test_items_come_through_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert list(track(iter("ab"), "counting", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_now_and_then_with_an_estimate(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("refusal_mi.progress.LOG_SECONDS", 0.0)
    assert list(track(iter("abc"), "[counting]", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  [counting]: 1 of 3 in 0:00, 0:00 left", "  [counting]: 2 of 3 in 0:00, 0:00 left"]
    assert list(track([4, 5, 1], "counting", total=10, work=lambda n: n)) == [4, 5, 1]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  counting: 4 of 10 in 0:00, 0:00 left", "  counting: 9 of 10 in 0:00, 0:00 left"]


def is_ours(output: Any) -> bool:
    """Whether it is the package's own bar."""
    return bool(output.get("metadata", {}).get("refusal_mi") == "progress")


@pytest.mark.slow
def test_a_notebook_shows_one_line_for_long_work_and_nothing_else(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
    from refresh import cleaned

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (SHORT, LONG, LONG, LOAD, EXPORT, THEIRS)]
    )
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    short, long, again, loaded, exported, theirs = (cell.outputs for cell in notebook.cells)
    assert short == [] and [output.text for output in loaded] == ["True\n"]
    assert [output.get("text") for output in exported if not is_ours(output)] == ["True\n"]
    assert any("Loading weights" in str(output) for output in theirs), "the control: transformers alone has a bar"
    for outputs in (long, again):
        line, printed = outputs
        bar = '<progress max="2" value="2"></progress> second: 2 of 2 in 0:00'
        assert line.data == {"text/plain": "second: 2 of 2 in 0:00", "text/html": bar} and printed.text == "between\n"
    left = [output for cell in cleaned(notebook).cells[:-1] for output in cell.outputs]
    assert [output.output_type for output in left] == ["stream"] * 4
