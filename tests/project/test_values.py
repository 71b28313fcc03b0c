"""Every frozen value is small when shown, and equal and hashed by its contents; results become tables."""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
from html.parser import HTMLParser

import pytest
import torch

import refusal_mi
from refusal_mi.directions import ActivationMeans, Direction, DirectionGrid
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import ABPoint, ABSweep, LossResult
from refusal_mi.model.provenance import ModelRecord
from refusal_mi.run.answers import Effect, SideEffects
from refusal_mi.run.combos import CombinationRow, CombosResult, ValidationRow
from refusal_mi.run.folder import RunInputs
from refusal_mi.run.options import CombosOptions
from refusal_mi.run.record import CombinationRecord
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.thresholds import CandidateScore
from refusal_mi.stats import Rate
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import load_pairs
from refusal_mi.values import Value
from tests.helpers.cases import HARMFUL, HARMLESS, analyses, grid_of

ROWS = tuple(CandidateScore(p, layer, p + layer / 10, 1.0, 0.05) for p in (-2, -1) for layer in range(4))


def public_dataclasses():
    for module in pkgutil.walk_packages(refusal_mi.__path__, "refusal_mi."):
        if not module.name.endswith("__main__"):
            for name, kind in vars(importlib.import_module(module.name)).items():
                is_own = inspect.isclass(kind) and kind.__module__ == module.name
                if is_own and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen:
                    yield f"{module.name}.{name}", kind


def test_whatever_holds_tensors_is_compared_by_value():
    found = 0
    for name, kind in public_dataclasses():
        fields = [each for each in dataclasses.fields(kind) if each.compare]
        if any("Tensor" in str(each.type) or hasattr(each.type, "dim_str") for each in fields):
            found += 1
            assert issubclass(kind, Value), f"{name} holds tensors: derive it from values.Value"
            assert kind.__eq__ is Value.__eq__ and kind.__hash__ is Value.__hash__, f"{name} does not say eq=False"
            assert "__repr__" not in vars(kind) or "__dataclass" not in str(kind.__repr__), name
    assert found > 25


@pytest.fixture(scope="module")
def results(tiny_model):
    return {kind: make() for kind, make in analyses(tiny_model("llama")).items()}


def test_every_result_is_short_and_equal_to_itself_alone(results, tiny_model):
    again = {kind: make() for kind, make in analyses(tiny_model("llama")).items()}
    for kind, result in results.items():
        assert len(repr(result)) < 500 and "\n" not in repr(result) and "tensor(" not in repr(result), repr(result)
        assert len(result._repr_html_()) < 6000 and "tensor(" not in result._repr_html_()
        assert result == again[kind] and hash(result) == hash(again[kind]), kind
        assert all(result != other for name, other in results.items() if name != kind)
        assert len({result, again[kind]}) == 1
        first = next(
            each.name
            for each in dataclasses.fields(result)
            if isinstance(getattr(result, each.name), torch.Tensor | dict) and each.name != "provenance"
        )
        held = getattr(result, first)
        moved = held + 1 if isinstance(held, torch.Tensor) else {key: value + 1 for key, value in held.items()}
        if kind != "logits":
            assert dataclasses.replace(result, **{first: moved}) != result, kind


def test_directions_and_interventions_are_equal_by_their_numbers():
    a, same, other = (Direction.of(torch.tensor([3.0, x]), 2) for x in (4.0, 4.0, 5.0))
    assert a == same and hash(a) == hash(same) and a != other and len({a, same, other}) == 2
    assert Direction.of(a.vector.double(), 2) != a != Direction.of(a.vector, 3) and a != "a"
    assert Add(a) == Add(same) != Add(a, 2.0) and hash(Add(a)) == hash(Add(same))
    assert Ablate([a, other]) == Ablate((same, other)) != Ablate([other, a])
    assert Ablate(a.vector) == Ablate(same.vector) and Ablate(a.vector) != Ablate(other.vector)
    assert (
        Ablate(a, layers=[1, 2]) == Ablate(a, layers=(1, 2))
        and len({Ablate(a, layers=[1]), Ablate(same, layers=(1,))}) == 1
    )
    used = Ablate(a)
    assert used.basis.shape == (1, 2) and used == Ablate(a)  # what was computed from it takes no part


def test_nan_is_equal_to_nan_and_tensors_to_no_number():
    means = [ActivationMeans(torch.tensor([[[x, float("nan")]]]).double(), (-1,), 3) for x in (1.0, 1.0, 2.0)]
    assert means[0] == means[1] != means[2] and len(set(means)) == 2


def test_a_direction_is_one_line_and_a_grid_its_shape_and_best_rows(tiny_model):
    model = tiny_model("llama")
    grid = grid_of(model, ChatFormat(model.tokenizer))
    direction = grid.direction(-1, 3)
    assert (
        repr(direction)
        == f"Direction(layer 3, position -1, norm {direction.norm:.4g}, d_model 32, blocks.3.hook_resid_pre)"
    )
    assert direction._repr_html_() is None
    lines = repr(grid).splitlines()
    assert lines[0] == "DirectionGrid: 5 positions -5..-1 × 5 layers × d_model 32" and len(lines) == 7
    norms = grid.vectors.norm(dim=-1)
    row, layer = divmod(int(norms.argmax()), 5)
    assert lines[2].split() == [str(grid.positions[row]), str(layer), f"{norms.max():.4g}"]
    assert len(repr(ChatFormat(model.tokenizer))) < 1000
    pairs = load_pairs("caa")
    assert len(pairs) > 20 and len(repr(pairs)) < 200 and str(len(pairs)) in repr(pairs)
    run = RunInputs(model, "runs/mine", max_prompts=7)
    assert len(repr(run)) < 300 and "runs/mine" in repr(run) and "7 prompts" in repr(run) and len(repr(model)) > 3000


def test_a_score_grid_shows_the_rows_that_select_would_choose():
    grid = ScoreGrid(ROWS, 4, 7.0, -7.0)
    lines = repr(grid).splitlines()
    best = select(grid).best
    assert lines[0] == "ScoreGrid: 2 positions × 4 layers, 8 candidates; plain model: harmful 7.00, harmless -7.00"
    assert lines[2].split() == [str(best.position), str(best.layer), "-2.000", "1.000", "0.050"]
    assert len(lines) <= 9 and lines[-1] == select(grid).explain()
    assert repr(select(grid)).splitlines()[2] == lines[2]
    table = grid.to_frame()
    assert table.shape[0] == 8 and table["bypass"].tolist() == [row.bypass for row in ROWS]
    assert select(grid).to_frame()["layer"].tolist()[0] == best.layer


def test_a_saved_grid_is_loaded_from_a_path_or_a_string(tmp_path, tiny_model):
    model = tiny_model("llama")
    grid = grid_of(model, ChatFormat(model.tokenizer))
    grid.save(str(tmp_path / "mean_diffs.pt"))
    found = DirectionGrid.load(str(tmp_path / "mean_diffs.pt"))
    assert torch.equal(found.vectors, grid.vectors) and found.positions == grid.positions
    assert found.is_degenerate == grid.is_degenerate and any(map(any, grid.is_degenerate))


def test_saved_scores_are_loaded(tmp_path):
    ScoreGrid(ROWS, 4).save(str(tmp_path / "scores.json"))
    assert ScoreGrid.load(tmp_path / "scores.json", 4) == ScoreGrid(ROWS, 4)


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not attrs

    def handle_data(self, data):
        self.text.append(data)


def test_tables_show_names_as_text():
    name = "<img src=x onerror=alert(1)>"
    effects = SideEffects("harmful", name, (Effect(name, Rate(1, 4), Rate(0, 4)),))
    page = Cells()
    page.feed(effects._repr_html_())
    assert page.tags == {"div", "b", "table", "tr", "th", "td"} and name in page.text
    assert effects.to_frame()["value"].tolist() == [0.25, 0.0]
    assert repr(effects).splitlines()[0] == f"harmful prompts ({name}), n = 4"


def test_every_result_is_a_table_of_its_numbers(results):
    for kind, result in results.items():
        for each in dataclasses.fields(result):
            held = getattr(result, each.name)
            if isinstance(held, torch.Tensor):
                table = result.to_frame(each.name)
                assert len(table) == held.numel(), (kind, each.name)
                assert torch.equal(
                    torch.tensor(table[each.name].tolist(), dtype=held.dtype).nan_to_num(), held.flatten().nan_to_num()
                )
            elif isinstance(held, dict) and held and each.name != "provenance":
                assert len(result.to_frame(each.name)) == sum(value.numel() for value in held.values())
        assert len(result.to_frame()) > 0
    table = results["projections"].to_frame()
    assert list(table.columns)[:4] == ["group", "prompt", "pos", "layer"] and "control_cosines" in table
    mean = table[(table.group == "harmful") & (table.pos == -1) & (table.layer == 3)]["projections"].mean()
    groups = [group == "harmful" for group in results["projections"].groups]
    assert mean == pytest.approx(results["projections"].projections[groups, -1, 3].mean().item())
    assert set(table["prompt"]) == {*HARMFUL, *HARMLESS}
    with pytest.raises(UserError, match="did you mean 'projections'"):
        results["projections"].to_frame("projection")


def test_without_pandas_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="to_frame needs pandas"):
        ScoreGrid(ROWS, 4).to_frame()


def test_sweeps_and_combinations_are_tables():
    points = tuple(ABPoint(13, m, 0.5 + m / 10, 0.4, 0.6, m / 10, 0.0, 0.1, 8) for m in (-1.0, 1.0))
    table = ABSweep("pairs", 0.5, points, 8).to_frame()
    assert table["p"].tolist() == [0.4, 0.6] and table["multiplier"].tolist() == [-1.0, 1.0]
    made = CombinationRecord("0-1", (0, 1), "span", ("blocks.1.hook_resid_pre",) * 2, (1.0, 1.0), 2, (1.0, 1.0), ())
    found = ValidationRow("0-1", -3.0, (-4.0, -2.0), 0.1, Rate(1, 4), Rate(0, 4), {"texts": LossResult(1.0, 2.7, 9)})
    model = ModelRecord("source", None, None, "llama", 2, 4, 8, "float32", "cpu")
    table = CombosResult(model, False, "done", CombosOptions(), combinations=(CombinationRow(made, found),)).to_frame()
    assert table[["bypass", "kl_nats", "refusal", "ce_loss (texts)"]].iloc[0].tolist() == [-3.0, 0.1, 0.25, 1.0]
