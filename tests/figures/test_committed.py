"""The pictures as committed, and the numbers beside them."""

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest

from refusal_mi.analysis.result import plot
from refusal_mi.model.loading import load_model
from tests.helpers.cases import analyses

FOLDER = Path(__file__).parents[2] / "figures"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_figures", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load()


def test_every_file_is_made_by_the_command() -> None:
    made = {f"{name}{suffix}" for name in make.PICTURES for suffix in (".png", ".json")}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == made | {"make.py"}


@pytest.mark.parametrize("name", make.PICTURES)
def test_a_picture_names_its_axes_its_model_and_n(name: str) -> None:
    found = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    names = " ".join(trace["name"] or "" for trace in found["traces"])
    assert found["title"] and "embedded model" in found["about"] and "n = " in found["about"] + names
    assert all(found["axes"]) and found["traces"]


def test_the_picture_of_the_readme_is_1600_pixels_wide() -> None:
    header = (FOLDER / "scores.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:24])[0] == 1600


def test_two_runs_give_the_same_numbers(tiny_dir) -> None:
    first, second = (numbers_of_a_run(tiny_dir("llama")) for _ in range(2))
    assert set(make.KINDS) <= set(first) and json.dumps(first) == json.dumps(second)
    assert any(value for trace in first["lens"]["traces"] for value in trace["y"])


def numbers_of_a_run(model_dir: Path) -> dict[str, Any]:
    """What stands in the JSON of each picture, from a model that was just loaded."""
    cases = analyses(load_model(model_dir, device="cpu", dtype="float32"))
    return {kind: make.numbers(plot(cases[kind]())) for kind in cases}


def test_numbers_are_the_values_of_the_traces_to_five_digits() -> None:
    import torch

    bars = go.Scatter(x=[1, 2], y=[0.123456, float("nan")], name="a", error_y={"array": [0.1, 0.2]})
    table = go.Heatmap(z=torch.tensor([[1.0, 2.0]]).numpy(), x=["a", "b"])
    figure = go.Figure([bars, table])
    figure.update_layout(title={"text": "t", "subtitle": {"text": "n = 2"}})
    found = make.numbers(figure)
    assert (found["title"], found["about"], found["axes"]) == ("t", "n = 2", [[], []])
    assert found["traces"][0] == {
        "type": "scatter",
        "name": "a",
        "x": [1, 2],
        "y": [0.12346, None],
        "error_array": [0.1, 0.2],
    }
    assert found["traces"][1]["z"] == [[1.0, 2.0]]
    json.dumps(found, allow_nan=False)
