"""A cell of a study whose files change or move: its numbers are those of a study from nothing."""

import json
from pathlib import Path

import pytest

from refusal_mi.cli.study import read_study
from refusal_mi.files import read_json, read_record, write_json
from refusal_mi.run.methods import MethodsResult
from refusal_mi.run.record import RunSummary
from refusal_mi.studies.study import run_study, states
from refusal_mi.studies.table import numbers, read_table
from tests.helpers.models import save_tiny

pytestmark = pytest.mark.slow
N_HARMFUL, N_HARMLESS = 3, 5
STUDY = """
models: {model: here/tiny, name: tiny}
data: {name: own, harmful: harmful.json, harmless: harmless.json, eval_set: few.json, text_set: texts.json}
methods: mean
seeds: 0
options:
  {device: cpu, n_train: 6, n_val: 4, n_test: 5, kl_max: inf, induce_min: -inf, filter: false, refusal_tokens: 40,
   steps: "directions,selection", compare-methods: {n_places: 1, n_random: 1, max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study that is done, of fewer harmful prompts than harmless ones."""
    folder = tmp_path_factory.mktemp("changes")
    save_tiny("llama", folder / "here/tiny", seed=0)
    for side in ("harmful", "harmless"):
        (folder / f"{side}.json").write_text(json.dumps([f"{side} {n}" for n in range(24)]))
    (folder / "few.json").write_text(json.dumps([f"odd {n}" for n in range(N_HARMFUL)]))
    (folder / "texts.json").write_text(json.dumps(["A short text.", "Another one."]))
    (folder / "study.yaml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, done("out")


def done(path):
    (ended,) = run_study(read_study(Path("study.yaml")), Path(path), apart=False)
    assert ended.state == "done", ended.says
    return {(row.stage, row.method, row.k, row.set, row.metric): row for row in read_table(path)}


def test_n_of_kl_is_all_harmless_prompts_and_n_of_pairs_is_the_smaller_side(place):
    folder, rows = place
    at = "compare-methods", "mean", 1
    path = folder / "out/tiny/own/seed-0"
    held = read_json(path / "methods/mean-1/held_out.json")
    assert rows[(*at, "harmless", "kl")].n == len(held["kl"][0]) == N_HARMLESS
    assert rows[(*at, "harmless", "kl_ratio")].n == rows[(*at, "harmful", "refused")].n == N_HARMFUL
    found = read_json(path / "methods/methods.json")
    for each in found["rows"][0]["curve"]:
        del each["n_harmless"]
    write_json(folder / "before.json", found)
    old = numbers(read_record(path / "summary.json", RunSummary), MethodsResult.load(folder / "before.json"))
    (kl,) = (each for each in old if each.metric == "kl" and each.method == "mean")
    assert kl.n is None and kl.value == rows[(*at, "harmless", "kl")].value, "a file of before reads"


def test_other_texts_in_the_same_file_give_the_numbers_of_a_study_from_nothing(place):
    folder, before = place
    (folder / "texts.json").write_text(json.dumps(["Quite other words, and more of these.", "0 1 2 3 4 5 6 7 8 9"]))
    (state,) = states(read_study(Path("study.yaml")), Path("out"))
    assert state.state == "changed"
    again, new = done("out"), done("new")
    assert {key: row.value for key, row in again.items()} == {key: row.value for key, row in new.items()}
    key = "compare-methods", "mean", 1, "plain texts", "ce_change"
    assert again[key].value != before[key].value, "the control: the texts matter"
