"""What a stranger types in the first hour runs from top to bottom: no exception, no deprecation, nothing unshown."""

import ast
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import finished_run

SCRIPT = Path(__file__).with_name("first_hour.py")
CELLS = SCRIPT.read_text("utf-8").split("# %%\n")[1:]
WRITTEN = ("mine.npy", "scores.html", "scores.json", "projections.json", "edited/model.safetensors", "rates.html")


def run_cell(source, names):
    """As a notebook does: everything runs, and the value of a last expression is shown; what was shown."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(SCRIPT), "exec"), names)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), str(SCRIPT), "eval"), names)
    return repr(value), value


@pytest.mark.slow
def test_the_first_hour(tmp_path, monkeypatch, tiny_dir):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"HF_FOLDER": str(tiny_dir("qwen2")), "RUN_FOLDER": str(finished_run(tmp_path / "run"))}
    shown = {}
    assert len(CELLS) >= 40
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", FutureWarning)
        for number, cell in enumerate(CELLS):
            try:
                shown[number] = run_cell(cell, names)
            except Exception as error:
                raise AssertionError(f"cell {number}:\n{cell}") from error
    for number, value in shown.items():
        assert value is None or len(value[0]) < 20_000, f"cell {number} shows {len(value[0])} characters"
    assert all((tmp_path / name).is_file() for name in WRITTEN)
    # What the hour finds is there, and its control is not.
    before, after = (names["answers"][0].text, None)
    harmful = names["refusal_scores"](names["model"], names["chat"], names["my_harmful"], names["prefixes"])
    removed, random = (
        names["refusal_scores"](
            names["model"],
            names["chat"],
            names["my_harmful"],
            names["prefixes"],
            interventions=names["Ablate"](names[which]),
        )
        for which in ("direction", "control")
    )
    assert harmful.mean() - removed.mean() > 2 > (harmful.mean() - random.mean()).abs()
    assert names["report"].is_verified and before and after is None
