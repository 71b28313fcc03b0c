"""The committed pictures are those that the command draws now, and the numbers beside them those that it finds now."""

import importlib.util
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest

from refusal_mi.analysis import dose
from refusal_mi.analysis.result import plot
from refusal_mi.model.loading import load_model
from tests.helpers.cases import analyses

FOLDER = Path(__file__).parents[2] / "figures"
SMALLER = ("dose", "combinations")
"""Pictures of minutes of work: made here from fewer prompts, so that only their words and traces are compared."""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_figures", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load()


def test_every_file_is_made_by_the_command() -> None:
    made = {f"{name}{suffix}" for name in make.PICTURES for suffix in (".png", ".json")}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == made | {"make.py", "real.py"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of every picture, from the embedded model as it is now."""
    build, of_run, combined = tmp_path_factory.mktemp("figures"), dose.from_run, make.combined
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dose, "from_run", lambda run: of_run(replace(run, max_prompts=2)))
        patched.setattr(dose, "RUN_TOKENS", 2)
        patched.setattr(dose, "MAX_TEXTS", 2)
        patched.setattr(make, "combined", lambda inputs, **_: combined(inputs, n_best=3, n_ce=2))
        make.compute(build, fresh=True)
        return {name: make.numbers(figure) for name, figure in make.draw(build).items()}


def committed(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def words(found: dict[str, Any]) -> Any:
    """What a picture says, without its numbers."""
    kinds = [(trace["type"], trace["name"]) for trace in found["traces"]]
    return re.sub(r"\d[\d.,]*", "#", json.dumps([found["title"], found["about"], found["axes"], kinds]))


def differing(found: dict[str, Any], expected: dict[str, Any], allowed: float = 1e-3) -> list[str]:
    """Columns of traces in which a number differs by more than `allowed` of the column's largest, or a text at all."""
    pairs = zip(found["traces"], expected["traces"], strict=True)
    return [f"{a['name']}, {key}" for a, b in pairs for key in b if not is_close(a.get(key), b[key], allowed)]


def is_close(found: Any, expected: Any, allowed: float) -> bool:
    flat, other = list(flattened(found)), list(flattened(expected))
    numbers = [abs(value) for value in other if isinstance(value, float | int)]
    limit = allowed * max(numbers, default=0.0)
    return len(flat) == len(other) and all(
        abs(a - b) <= limit if isinstance(a, float | int) and isinstance(b, float | int) else a == b
        for a, b in zip(flat, other, strict=True)
    )


def flattened(value: Any) -> Any:
    if not isinstance(value, list):
        yield value
        return
    for each in value:
        yield from flattened(each)


@pytest.mark.slow
@pytest.mark.parametrize("name", make.PICTURES)
def test_a_committed_picture_is_what_is_drawn_now(name: str, drawn: dict[str, Any]) -> None:
    assert words(drawn[name]) == words(committed(name))
    if name not in SMALLER:
        assert drawn[name]["about"] == committed(name)["about"]
        assert differing(drawn[name], committed(name)) == []


@pytest.mark.parametrize("name", make.PICTURES)
def test_a_picture_with_one_other_number_is_seen(name: str) -> None:
    expected, stale = committed(name), committed(name)
    assert differing(expected, expected) == []
    key = next(key for key in ("z", "y") if key in stale["traces"][0])
    values = [stale["traces"][0][key]]
    while isinstance(values[0], list):
        values = values[0]
    place = next(index for index, value in enumerate(values) if isinstance(value, float | int))
    values[place] += 0.01 * (1 + max(abs(value) for value in flattened(stale["traces"][0][key]) if value is not None))
    assert differing(stale, expected) == [f"{expected['traces'][0]['name']}, {key}"]
    stale["traces"][0]["name"] = "another"
    assert words(stale) != words(expected)


@pytest.mark.parametrize("name", make.PICTURES)
def test_a_picture_names_its_axes_its_model_and_n(name: str) -> None:
    found = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    names = " ".join(trace["name"] or "" for trace in found["traces"])
    assert found["title"] and "embedded model" in found["about"] and "n = " in found["about"] + names
    assert all(found["axes"]) and found["traces"]


def test_the_picture_of_the_readme_is_1600_pixels_wide() -> None:
    header = (FOLDER / "scores.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:24])[0] == 1600


@pytest.mark.slow
def test_two_runs_give_the_same_numbers(tiny_dir) -> None:
    first, second = (numbers_of_a_run(tiny_dir("llama")) for _ in range(2))
    assert set(make.KINDS) == set(first) and json.dumps(first) == json.dumps(second)
    assert any(value for trace in first["lens"]["traces"] for value in trace["y"])


def numbers_of_a_run(model_dir: Path) -> dict[str, Any]:
    """What stands in the JSON of each picture, from a model that was just loaded."""
    cases = analyses(load_model(model_dir, device="cpu", dtype="float32"))
    return {kind: make.numbers(plot(cases[kind]())) for kind in make.KINDS}


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
