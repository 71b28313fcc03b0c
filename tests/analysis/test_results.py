"""Every analysis: runs on every kind of block, does not see its batches, saves, loads and draws the same."""

import json
from dataclasses import fields

import pytest
import torch

from refusal_mi.analysis import KINDS
from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.projections import ProjectionsResult
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.cli.analyze import redraw
from refusal_mi.errors import UserError
from refusal_mi.reading import template_residuals
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, HARMFUL, HARMLESS, TOKENS, analyses
from tests.helpers.tiers import first_is_fast


def tensors_of(result):
    return {
        item.name: getattr(result, item.name) for item in fields(result) if torch.is_tensor(getattr(result, item.name))
    }


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_residuals_do_not_depend_on_batch_size(tiny_model, family):
    model = tiny_model(family)
    chat, prompts = ChatFormat(model.tokenizer), [*HARMFUL, *HARMLESS]
    alone, together = (template_residuals(model, chat, prompts, batch_size=size) for size in (1, 16))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6 * alone.abs().max().item())
    assert (alone - alone.roll(1, 0)).abs().max() > 0.1, "prompts in the wrong order would be seen"


@pytest.mark.slow
def test_results_do_not_depend_on_batch_size(tiny_model):
    model = tiny_model("gpt2")  # learned positions: padding shows if it can
    alone, together = analyses(model, 1), analyses(model, 16)
    for kind in ("lens", "projections", "geometry", "pca"):
        first, second = tensors_of(alone[kind]()), tensors_of(together[kind]())
        for name, value in first.items():
            allowed = 2e-5 * value.nan_to_num().abs().max().item() + 1e-9
            torch.testing.assert_close(value, second[name], rtol=0, atol=allowed, equal_nan=True)


@pytest.mark.slow
def test_probes_do_not_depend_on_batch_size(tiny_model):
    model = tiny_model("gpt2")
    first, second = analyses(model, 1)["probes"](), analyses(model, 16)["probes"]()
    torch.testing.assert_close(first.auc, second.auc, rtol=0, atol=1e-9)
    torch.testing.assert_close(first.cosines, second.cosines, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_analysis_runs_saves_loads_and_draws_the_same(tiny_model, tmp_path, family):
    cases = analyses(tiny_model(family))
    assert set(cases) == set(KINDS)
    for kind, analyze in cases.items():
        result = analyze()
        if family != "llama":
            continue
        result.save(tmp_path / f"{kind}.json")
        again = load_result(tmp_path / f"{kind}.json")
        assert type(again) is type(result)
        for item in fields(result):
            value, loaded = getattr(result, item.name), getattr(again, item.name)
            if torch.is_tensor(value) or (isinstance(value, dict) and item.name != "provenance"):
                torch.testing.assert_close(loaded, value, rtol=0, atol=0, equal_nan=True)
            elif item.name != "provenance":
                assert loaded == value, (kind, item.name)
        drawn, before = figures(again), figures(result)
        assert next(iter(drawn)) == kind and list(drawn) == list(before)
        for name, figure in drawn.items():
            assert isinstance(figure, str) or figure.to_json() == before[name].to_json(), name


@pytest.mark.slow
def test_figures_name_axes_model_and_n(tiny_model):
    for analyze in analyses(tiny_model("llama")).values():
        result = analyze()
        for name, figure in figures(result).items():
            if isinstance(figure, str):
                assert "https://" not in figure.partition("<script")[0] and result.model_name in figure
                continue
            layout = figure.layout
            about = layout.title.subtitle.text
            assert result.model_name in about, name
            shown = about + " ".join(trace.name or "" for trace in figure.data)
            shown += " ".join(note.text for note in layout.annotations)
            assert "n = " in shown or "1 prompt" in shown or "prompt 1 of" in shown, name
            for axes in (figure.select_xaxes(), figure.select_yaxes()):
                assert any(axis.title.text for axis in axes), name


def test_saved_json_says_axes_and_units(tiny_model, tmp_path):
    result = analyses(tiny_model("llama"))["projections"]()
    result.save(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["tensors"]["axes"]["cosines"] == "prompt pos layer"
    assert set(record["units"]) <= {item.name for item in fields(result)}
    assert record["provenance"]["prompts"]["harmful"]["n"] == 6


def test_redraw_needs_no_model(tiny_model, tmp_path):
    analyses(tiny_model("llama"))["lens"]().save(tmp_path / "lens.json")
    written = redraw(tmp_path / "lens.json", tmp_path / "out")
    assert {path.name for path in written} == {"lens.html", "lens_gap.html", "plotly.min.js"}
    assert "https://cdn" not in (tmp_path / "out" / "lens.html").read_text()


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not an analysis result"):
        load_result(tmp_path / "other.json")
    record = {"kind": "nonsense", "format": 1, "fields": {}, "provenance": {}}
    (tmp_path / "other.json").write_text(json.dumps(record))
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no such analysis"):
        load_result(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("lens", "position", "<a href='x'>-1</a>"),
        ("lens", "refusal_tokens", ["5"]),
        ("lens", "scores", [[1.0]]),
        ("pca", "layers", 3),
        ("patching", "sites", ["<b>"]),
        ("patching", "controls", {"resid": [1.0]}),
    ],
)
def test_a_field_of_another_type_is_refused(tiny_model, tmp_path, kind, name, value):
    path = tmp_path / f"{kind}.json"
    analyses(tiny_model("llama"))[kind]().save(path)
    load_result(path)
    record = json.loads(path.read_text())
    record["fields"][name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged, or was saved by another version"):
        load_result(path)


def test_what_is_no_tensor_is_refused_among_the_tensors(tiny_model, tmp_path):
    path = tmp_path / "lens.json"
    analyses(tiny_model("llama"))["lens"]().save(path)
    record, tensors = json.loads(path.read_text()), torch.load(path.with_suffix(".pt"), weights_only=True)
    del record["fields"]["position"]
    path.write_text(json.dumps(record))
    torch.save({**tensors, "position": "<a href='x'>-1</a>"}, path.with_suffix(".pt"))
    with pytest.raises(UserError, match="other than tensors"):
        load_result(path)
    torch.save([1.0], path.with_suffix(".pt"))
    with pytest.raises(UserError, match="by name"):
        load_result(path)


def test_a_result_without_its_optional_tensors_loads(tiny_model, tmp_path):
    model = tiny_model("llama")
    result = patch_activations(model, ChatFormat(model.tokenizer), HARMFUL[:2], HARMLESS[:2], TOKENS, layers=[0])
    result.save(tmp_path / "patching.json")
    assert load_result(tmp_path / "patching.json").directional == {} == result.directional


def test_every_public_name_exists():
    import refusal_mi.analysis as package

    for names in KINDS.values():
        assert all(hasattr(package, name) for name in names)


def test_findings_are_the_ends_of_every_quantity_worked_out_by_hand():
    """Means over the prompts of a group, then the least and the most with their places."""
    shape = (4, 2, 3)  # prompt, pos, layer
    values = torch.zeros(shape, dtype=torch.float64)
    values[0, 1, 2], values[1, 1, 2], values[0, 0, 1] = 3.0, 5.0, -1.0  # a: most 4 at (-1, 2), least -0.5 at (-2, 1)
    values[2, 0, 0], values[3, 1, 1] = float("nan"), 8.0  # b: NaN is left out of the mean
    result = ProjectionsResult(
        values,
        torch.full(shape, float("nan"), dtype=torch.float64),
        values,
        values,
        ("a", "a", "b", "b"),
        tuple("wxyz"),
        (-2, -1),
        ("s", "t"),
        3,
        None,
        2.5,
    )
    found = {row.name: row for row in result.findings()}
    first = found["projections, a"]
    assert (first.least, first.least_at, first.most, first.most_at) == (
        "-0.5",
        "pos -2, layer 1",
        "4",
        "pos -1, layer 2",
    )
    assert first.unit == "residual stream units" and first.value == ""
    assert (found["projections, b"].most, found["projections, b"].most_at) == ("4", "pos -1, layer 1")
    assert found["direction_norm"].value == "2.5" and found["direction_layer"].value == "3"
    assert not any(name.startswith("cosines") for name in found)  # it has no number


@pytest.mark.slow
def test_every_analysis_has_findings(tiny_model):
    for kind, analyze in analyses(tiny_model("llama")).items():
        result = analyze()
        rows = result.findings()
        assert rows and any(row.most for row in rows), kind
        for row in rows:
            assert row.value or float(row.least) <= float(row.most), (kind, row)
