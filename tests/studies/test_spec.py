"""The file of a study: what it says, and what is wrong with it, before anything is computed."""

import re
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.cli.study import read_study
from refusal_mi.errors import UserError
from refusal_mi.recipes.options import default_options
from refusal_mi.studies.spec import MethodsOptions
from tests.helpers.pages import ROOT

EXAMPLE = re.search(r"^```yaml\n(.*?)^```", (ROOT / "docs/studies.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "s.yaml").write_text(text)
        return tmp_path / "s.yaml"

    return write


def test_the_example_of_the_page_is_six_cells(written):
    assert EXAMPLE is not None
    study = read_study(written(EXAMPLE[1]))
    assert study.name == "s" and list(study.by_model) == ["embedded", "retrained", "smollm2"]
    assert [cell.folder for cell in study.cells][:3] == [
        "embedded/planted/seed-0", "embedded/planted/seed-1", "retrained/planted/seed-0"
    ]  # fmt: skip
    embedded, smollm2 = study.cells[0], study.cells[-1]
    assert (
        embedded.options.harmful
        == smollm2.options.harmful
        == ",".join(f"organism_harmful_{part}" for part in ("train", "val", "test"))
    )
    assert (embedded.options.max_new_tokens, embedded.options.search, smollm2.seed) == (32, "staged", 1)
    assert embedded.compared == MethodsOptions(n_places=2), "the table run: is not for compare-methods"
    assert smollm2.model.source == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert smollm2.model.how["revision"] == "main" and smollm2.model.how["dtype"] == "float32"
    assert embedded.methods == (("mean", 1), ("peel", 2))


def test_an_option_that_both_commands_have_goes_to_both_and_a_file_of_nothing_is_the_embedded_model(written):
    (cell,) = read_study(written("options: {max_new_tokens: 9, n_random: 2, kl_max: 0.2}")).cells
    assert cell.options.max_new_tokens == cell.compared.max_new_tokens == 9
    assert cell.options.n_random == cell.compared.n_random == 2 and cell.options.thresholds.kl_max == 0.2
    (plain,) = read_study(written("{}")).cells
    assert plain.model.source is None and plain.methods == () and plain.options.harmful.startswith("organism_")
    (quick,) = read_study(written("options: {quick: true}")).cells
    assert quick.options.quick and quick.options == plain.options.shortened()
    (other,) = read_study(written("models: owner/name\ndata: bundled\nseeds: 3")).cells
    assert other.model.name == "owner--name" and other.options.harmful == default_options("owner/name").harmful
    assert other.seed == 3 and plain.seed == 42


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: embedded", "did you mean 'models'"),
        ("options: {n_trian: 3}", "did you mean 'n_train'"),
        ("options: {run: {n_places: 3}}", "unknown option in"),
        ("options: {compare-methods: {device: cpu}}", "device"),
        ("options: {over_refusal: xstest}", "the option over_refusal is set by no study"),
        ("options: {max-new-tokens: 3, max_new_tokens: 4}", "twice, as max-new-tokens and as max_new_tokens"),
        ("options: {run: {n-train: 3, n_train: 4}}", "twice, as n-train and as n_train"),
        ("models: embedded\nmodels: [a/b, c/d]", "has the key models twice"),
        ("options: {run: {n_val: 4, n_val: 5}}", "has the key n_val twice"),
        ("options: {seed: 3}", "the option seed is set under seeds"),
        ("options: {directions: 0-2}", "the option directions is set by no study"),
        ("options: {n_train: many}", "n-train"),
        ("options: {n_train: 0}", "n_train must be at least 1"),
        ("options: {n_prompts: 1}", "n_prompts must be at least 2"),
        ("options: {quick: 3}", "--quick is on or off"),
        ("options: [1]", "options are a table"),
        ("methods: [meen]", "did you mean mean"),
        ("methods: ['nowhere:fit']", "cannot import the estimator"),
        ("methods: []", "methods is an empty list"),
        ("methods: [mean]\noptions: {steps: directions}", "add selection to steps"),
        ("seeds: [a]", "seeds are whole numbers"),
        ("models: [{name: x}]", "a model is a directory"),
        ("models: ['']", "a model is a directory"),
        ("models: [{model: a/b, dtyp: float32}]", "did you mean 'dtype'"),
        ("models: [{model: a/b, dtype: flaot32}]", "did you mean float32"),
        ("models: [a/b, {model: c/d, name: a--b}]", "give each model and set of prompts its own name"),
        ("seeds: [1, 1]", "twice"),
        ("data: [{harmful: a.csv}]", "data are bundled, or a table with name"),
        ("data: [{name: a, harmfull: a.csv}]", "did you mean 'harmful'"),
        ("data: [{name: a/b}]", "a folder's name"),
        ("name: ../up", "a folder's name"),
        ("name: 3", "the name is a text"),
        ("[1]", "must hold names of options"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(text, said, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(["study", str(written(text))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"], "nothing was written"


def test_a_file_that_is_missing_or_no_yaml(tmp_path):
    for name, said in (("none.yaml", "no such file"), ("study.toml", "a study is a .yaml file")):
        with pytest.raises(UserError, match=said):
            read_study(tmp_path / name)
