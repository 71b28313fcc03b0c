"""The notebooks as committed: run, short, clean, with a picture that code hosts show beside every figure.

The first is run here; `make notebooks` runs all of them and compares them in the same way, that on a real model where
there is one.
"""

import ast
import copy
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.model.points import resid_hook
from refusal_mi.notebook import placed, scaling, show_static, side_by_side, splits, table
from refusal_mi.text.chat import ChatFormat

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY, SVG = "application/vnd.plotly.v1+json", "image/svg+xml"


def load() -> ModuleType:
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = load()


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["cells"]


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in code(path) for output in cell["outputs"]]


def long_functions(source: str, limit: int = 5) -> list[str]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [node.name for node in found if (node.end_lineno or 0) - node.lineno + 1 > limit]


def test_there_are_eight_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 9)]


def test_a_notebook_on_a_real_model_is_left_out_where_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((name, model),) = refresh.NEEDS.items()
    assert FOLDER / name in NOTEBOOKS
    (tmp_path / model).mkdir()
    runs: list[Any] = []
    monkeypatch.setattr(refresh, "execute", runs.append)
    monkeypatch.setattr(refresh, "BUILD", tmp_path)
    monkeypatch.setattr("sys.argv", ["refresh.py", "--check", str(FOLDER / name), str(NOTEBOOKS[0])])
    monkeypatch.delenv(refresh.REAL_MODELS, raising=False)
    for folder in (None, tmp_path):  # the second holds a folder of that name without a model
        if folder is not None:
            monkeypatch.setenv(refresh.REAL_MODELS, str(folder))
        assert refresh.main() == 0 and len(runs) == 1
        left_out, other = capsys.readouterr().out.splitlines()
        assert left_out.startswith(f"{name}: left out, there is no {model}") and other.startswith(NOTEBOOKS[0].name)
        runs.clear()
    (tmp_path / model / "config.json").write_text("{}")
    assert refresh.main() == 0 and len(runs) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
class TestNotebook:
    def test_is_small(self, path: Path) -> None:
        assert path.stat().st_size <= 1_000_000

    def test_ran_from_top_to_bottom_without_an_error(self, path: Path) -> None:
        assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))
        assert {output["output_type"] for output in outputs(path)} <= {"display_data", "execute_result"}

    def test_every_figure_has_a_static_picture(self, path: Path) -> None:
        bundles = [output["data"] for output in outputs(path) if PLOTLY in output["data"]]
        assert bundles or path.name.startswith("07")
        assert all(SVG in bundle for bundle in bundles)

    def test_opens_with_three_lines_on_what_is_learned(self, path: Path) -> None:
        first = read(path)[0]
        lines = "".join(first["source"]).splitlines()
        assert first["cell_type"] == "markdown" and lines[0].startswith(f"# {path.name[:2]} · ")
        assert sum(line.startswith("You will ") for line in lines) == 3

    def test_says_how_to_run_it_in_colab(self, path: Path) -> None:
        urls = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
        repository = urls.get("Repository", "").removeprefix("https://github.com/")
        file = f"/github/{repository}/blob/main/notebooks/{path.name}" if repository else ""
        assert f"[Open in Colab](https://colab.research.google.com{file})" in "".join(read(path)[0]["source"])
        first = "".join(code(path)[0]["source"]).splitlines()[0]
        assert first.startswith("# %pip install -q ") and "refusal_mi" in first  # no line that installs runs by itself

    def test_one_line_changes_the_model(self, path: Path) -> None:
        lines = [line for cell in code(path) for line in "".join(cell["source"]).splitlines()]
        assert sum(line.startswith("MODEL = ") for line in lines) == 1

    def test_functions_are_short(self, path: Path) -> None:
        assert long_functions("\n".join("".join(cell["source"]) for cell in code(path))) == []

    def test_nothing_of_the_machine_is_left(self, path: Path) -> None:
        text = path.read_text("utf-8")
        assert not re.search(r"/(home|root|tmp|work|Users|usr)/|C:\\\\|\\u001b|Warning|it/s", text)


@pytest.mark.slow
def test_the_first_says_what_is_committed() -> None:
    import nbformat

    committed, notebook = (nbformat.read(NOTEBOOKS[0], as_version=4) for _ in range(2))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"import sys; sys.modules['kaleido'] = None  # draw no static pictures\n{first.source}"
    refresh.execute(notebook)
    assert refresh.differences(notebook, committed) == []


def number(cells: list[Any]) -> None:
    texts = [output["data"]["text/markdown"] for cell in cells for output in cell.get("outputs", []) if is_text(output)]
    place = next(index for index, text in enumerate(texts) if re.search(r"\d\.\d", text))
    change(cells, place, lambda text: re.sub(r"(\d)(\.\d)", lambda m: f"{int(m[1]) + 1}{m[2]}", text, count=1))


def word(cells: list[Any]) -> None:
    change(cells, 0, lambda text: f"{text} x")


def change(cells: list[Any], place: int, edit: Callable[[str], str]) -> None:
    outputs = [output for cell in cells for output in cell.get("outputs", []) if is_text(output)]
    outputs[place]["data"]["text/markdown"] = edit(outputs[place]["data"]["text/markdown"])


def is_text(output: Any) -> bool:
    return "text/markdown" in output.get("data", {})


def figure(cells: list[Any]) -> Any:
    return next(o["data"][PLOTLY] for cell in cells for o in cell.get("outputs", []) if PLOTLY in o.get("data", {}))


def value(cells: list[Any]) -> None:
    trace = figure(cells)["data"][0]
    trace["y"] = [*range(100)]


def trace(cells: list[Any]) -> None:
    figure(cells)["data"].pop()


def title(cells: list[Any]) -> None:
    figure(cells)["layout"]["title"]["text"] += "!"


def missing(cells: list[Any]) -> None:
    next(cell for cell in cells if cell.get("outputs"))["outputs"].pop()


@pytest.mark.parametrize("edit", [number, word, value, trace, title, missing])
def test_an_output_that_says_something_else_is_seen(edit: Callable[[list[Any]], None]) -> None:
    import nbformat

    committed = nbformat.read(NOTEBOOKS[0], as_version=4)
    stale = copy.deepcopy(committed)
    assert refresh.differences(stale, committed) == []
    edit(stale.cells)
    assert len(refresh.differences(stale, committed)) == 1


def test_a_long_function_would_be_found() -> None:
    body = "\n".join(f"    x{line} = {line}" for line in range(5))
    assert long_functions(f"def f():\n{body}") == ["f"] and long_functions("def f():\n    pass") == []


def test_splits_are_those_of_the_model() -> None:
    own, general = splits(None, n_train=4, n_val=2, n_test=2), splits("owner/name", n_train=4, n_val=2, n_test=2)
    assert own[0].train.name == "organism_harmful_train" and general[1].train.name == "harmless"
    assert [len(part) for part in (own[0].train, own[0].val, general[0].test)] == [4, 2, 2]


def test_placed_keeps_only_where_a_direction_points() -> None:
    import torch

    one = Direction(torch.tensor([3.0, 0.0, 4.0]), 1, resid_hook(1, 4))
    like = Direction(torch.tensor([0.0, 2.0, 0.0]), 3, resid_hook(3, 4))
    moved = placed(one, like)
    assert (moved.layer, moved.hook_name) == (3, like.hook_name)
    torch.testing.assert_close(moved.vector, torch.tensor([1.2, 0.0, 1.6]))


def test_colab_keeps_the_way_in_which_it_shows_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io as pio

    for name in ("kaleido", "_KALEIDO_AVAILABLE"):  # imported before it is hidden, and forgotten with the test
        monkeypatch.setattr(f"plotly.io._kaleido.{name}", None)
    monkeypatch.setitem(sys.modules, "kaleido", None)
    before = pio.renderers.default
    try:
        pio.renderers.default = "colab"
        show_static()
        assert pio.renderers.default == "colab"
        pio.renderers.default = "browser"
        with pytest.warns(UserWarning, match="figures are interactive only"):
            show_static()
        assert pio.renderers.default == "plotly_mimetype"
    finally:
        pio.renderers.default = before


def test_table_escapes_what_models_write(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("refusal_mi.notebook.say", shown.append)
    table([{"answer": "<script>a|b</script>\nc", "value": 0.5}])
    assert shown[0].splitlines()[-1] == "| &lt;script&gt;a\\|b&lt;/script&gt; c | 0.500 |"
    with pytest.raises(UserError, match="at least one row"):
        table([])


def test_a_change_cannot_take_the_column_of_prompts(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    chat, shown = ChatFormat(model.tokenizer), []
    monkeypatch.setattr("refusal_mi.notebook.say", shown.append)
    with pytest.raises(UserError, match=r"a change is called 'prompt'.*give it another name"):
        side_by_side(model, chat, ["Say hi"], {"plain": (), "prompt": ()}, 2)
    assert not shown
    side_by_side(model, chat, ["Say hi"], {"plain": ()}, 2)
    assert shown[0].splitlines()[0] == "| prompt | plain |" and "| Say hi | " in shown[0]


@pytest.mark.parametrize("box", ["", ' viewBox="0 0 1080 476"'])
def test_a_static_figure_scales_with_the_page(box: str) -> None:
    svg = f'<svg class="main-svg" width="1080" height="476" style=""{box}><rect width="3" height="4"/></svg>'
    head, _, rest = scaling(svg).partition(">")
    assert 'viewBox="0 0 1080 476"' in head and 'style="width:100%;max-width:1080px;height:auto"' in head
    assert not re.search(r' (width|height)="', head) and rest == '<rect width="3" height="4"/></svg>'
    with pytest.raises(ValueError, match="does not say its size"):
        scaling("<svg></svg>")
