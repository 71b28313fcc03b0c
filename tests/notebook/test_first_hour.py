"""What a stranger types in the first hour runs from top to bottom: no exception, no warning, no screens of numbers."""

import ast
import warnings
from pathlib import Path

import pytest
import torch

from refusal_mi import Ablate, refusal_scores
from tests.helpers.runs import finished_run

SCRIPT = Path(__file__).with_name("first_hour.py")
CELLS = SCRIPT.read_text("utf-8").split("# %%\n")[1:]
WRITTEN = ("mine.npy", "scores.html", "scores.json", "projections.json", "edited/model.safetensors", "rates.html")


def run_cell(source, names):
    """As a notebook does: everything runs, and the value of a last expression is shown; its text, or nothing."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(SCRIPT), "exec"), names)
    if last is None:
        return ""
    return repr(eval(compile(ast.Expression(last.value), str(SCRIPT), "eval"), names))


@pytest.mark.slow
def test_the_first_hour(tmp_path, monkeypatch, tiny_dir):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"HF_FOLDER": str(tiny_dir("qwen2")), "RUN_FOLDER": str(finished_run(tmp_path / "run"))}
    shown = {}
    assert len(CELLS) >= 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, cell in enumerate(CELLS):
            try:
                shown[number] = run_cell(cell, names)
            except Exception as error:
                raise AssertionError(f"cell {number}:\n{cell}") from error
    for number, value in shown.items():
        assert len(value) < 3000 or "Figure(" in value, f"cell {number} shows {len(value)} characters"
    assert all((tmp_path / name).is_file() for name in WRITTEN)
    # What the hour finds is there, and with its control it is not.
    model, chat, prefixes, asks = *(names[each] for each in ("model", "chat", "prefixes")), names["harmful"][:16]
    plain = refusal_scores(model, chat, asks, prefixes).mean()
    removed, random = (
        refusal_scores(model, chat, asks, prefixes, interventions=Ablate(names[which])).mean()
        for which in ("direction", "control")
    )
    assert plain - removed > 4 > 4 * abs(plain - random), (plain, removed, random)
    assert names["report"].is_verified
