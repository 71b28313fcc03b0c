"""A user's function as the estimator: handed over in Python, or named on the command line."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.files import read_json, read_tensors
from refusal_mi.recipes.arditi import run
from refusal_mi.recipes.search import named_estimator
from refusal_mi.run.options import RunOptions
from refusal_mi.run.stages import RunFolder
from refusal_mi.search.thresholds import NO_THRESHOLDS

OPTIONS = RunOptions(
    n_train=6,
    n_val=3,
    n_test=3,
    filter_prompts=False,
    refusal_tokens=(5, 40),
    response_prefix="",
    batch_size=16,
    steps=("directions", "selection"),
    thresholds=NO_THRESHOLDS,
)
WORDS = [
    *("--n-train=6", "--n-val=3", "--n-test=3", "--no-filter", "--refusal-tokens=5,40", "--no-thresholds"),
    *("--steps=directions,selection", "--quick"),
]
MODULE = """
from dataclasses import replace
from refusal_mi.directions import difference_in_means

def scaled(harmful, harmless):
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors={factor} * grid.vectors)

def narrow(harmful, harmless):
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors=grid.vectors[:, :1])

number = 3
"""


def turned(harmful, harmless):
    """Not a multiple of the difference of means."""
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors=grid.vectors.roll(1, -1))


def candidates(folder):
    made = folder / "generate_directions"
    return read_tensors(made / "mean_diffs.pt"), read_json(made / "mean_diffs.json")["method"]


@pytest.fixture(scope="module")
def source(tiny_dir):
    return str(tiny_dir("llama").resolve())


def test_a_function_makes_the_candidates_that_are_scored(tiny_model, source, tmp_path):
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path / "plain"))
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path / "turned"), estimator=turned)
    plain, turned_ones = candidates(tmp_path / "plain"), candidates(tmp_path / "turned")
    torch.testing.assert_close(turned_ones[0], plain[0].roll(1, -1))
    assert (plain[1], turned_ones[1]) == ("difference in means, harmful - harmless", f"{__name__}:turned")
    scores = [
        read_json(tmp_path / name / "select_direction/direction_evaluations.json") for name in ("plain", "turned")
    ]
    assert scores[0] != scores[1]
    best = read_json(tmp_path / "turned/direction_metadata.json")
    chosen = read_tensors(tmp_path / "turned/direction.pt")
    torch.testing.assert_close(chosen.double(), turned_ones[0][best["pos"], best["layer"]])


def test_another_estimator_in_the_same_folder_is_computed_again(tiny_model, source, tmp_path):
    lines = []
    for estimator in (None, turned, turned, lambda *means: turned(*means), None):
        said = []
        run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path, False, said.append), estimator=estimator)
        lines.append(any(line.startswith("directions") and "kept" in line for line in said))
    assert lines == [False, False, True, False, False]


def test_the_command_line_names_one_in_the_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text(MODULE.format(factor=2))
    for name, extra in (("plain", []), ("scaled", ["--estimator", "mine_here:scaled"])):
        assert exit_status(["run", source, *WORDS, *extra, "--output-dir", name]) == 0
    plain, scaled = candidates(tmp_path / "plain"), candidates(tmp_path / "scaled")
    torch.testing.assert_close(scaled[0], 2 * plain[0])
    assert scaled[1] == "mine_here:scaled"
    assert read_json(tmp_path / "scaled/run.json")["options"]["estimator"] == "mine_here:scaled"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("scaled", "named module:function, not 'scaled'"),
        ("no_such_module_here:scaled", "cannot import the estimator no_such_module_here:scaled"),
        ("mine_there:absent", "mine_there has no function 'absent'"),
        ("mine_there:number", "mine_there has no function 'number'"),
        ("mine_there:narrow", "a DirectionGrid with one vector for each position and layer"),
    ],
)
def test_what_is_no_estimator_is_one_line(source, tmp_path, monkeypatch, capsys, name, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_there.py").write_text(MODULE.format(factor=2))
    assert exit_status(["run", source, *WORDS, "--estimator", name, "--output-dir", "out"]) == 2
    errors = capsys.readouterr().err
    assert line in errors and "Traceback" not in errors


def test_an_error_inside_the_module_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_here.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"cannot import the estimator broken_here:x: .*division by zero"):
        named_estimator("broken_here:x")
