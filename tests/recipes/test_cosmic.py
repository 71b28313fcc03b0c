"""COSMIC on the command line: the choice of the library's functions, beside the published one, which does not move."""

import json

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import cosine
from refusal_mi.errors import UserError
from refusal_mi.files import read_json, write_json
from refusal_mi.reading import template_residuals
from refusal_mi.recipes.cosmic import FILE, CosmicRecord, cosmic_of_run
from refusal_mi.run.folder import RunInputs
from refusal_mi.search.cosmic import cosmic_scores, evaluation_layers, select_cosmic
from refusal_mi.search.grid import select

WORDS = [
    *("--n-train=8", "--n-val=4", "--n-test=2", "--no-filter", "--refusal-tokens=5,40", "--no-thresholds"),
    *("--steps=directions,selection", "--quick"),
]
RULE = ["--rule=cosmic", "--no-thresholds", "--json"]


@pytest.fixture(scope="module")
def folder(tiny_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert exit_status(["run", str(tiny_dir("llama")), *WORDS, f"--output-dir={path}"]) == 0
    return path


def asked(words, capsys):
    capsys.readouterr()
    status, said = exit_status(["select", *words]), capsys.readouterr()
    return status, json.loads(said.out) if said.out.startswith("{") else said.out, said.err


def test_the_choice_is_that_of_the_functions_and_the_run_keeps_its_own(folder, tiny_model, capsys):
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".stages" not in path.parts}
    status, found, said = asked([str(folder), *RULE], capsys)
    assert status == 0 and "cosmic: " in said and "done before" not in said
    model, run = tiny_model("llama"), RunInputs(tiny_model("llama"), folder)
    sides = [run.record.side(side) for side in ("harmful", "harmless")]
    outputs = range(1, model.cfg.n_layers + 1)
    means = [
        template_residuals(model, run.chat, side.kept("train"), layers=outputs, n_last=1).double().mean(0)[0]
        for side in sides
    ]
    layers = evaluation_layers(*means)
    scores = cosmic_scores(model, run.chat, run.grid, *(side.kept("val") for side in sides), layers)
    chosen = select_cosmic(scores, model.cfg.n_layers, kl_max=None, prune_layers=None)
    best, own = found["survivors"][0], select(run.scores, run.options.thresholds).best
    assert (best["position"], best["layer"]) == (chosen.best.position, chosen.best.layer)
    assert best["refusal_score"] == pytest.approx(chosen.best.comply, abs=1e-5) and found["layers"] == list(layers)
    assert len(found["survivors"]) == len(chosen.survivors)
    assert (found["published"][0]["position"], found["published"][0]["layer"]) == (own.position, own.layer)
    one, other = (run.grid.direction(row.position, row.layer) for row in (chosen.best, own))
    assert found["cosine"] == pytest.approx(cosine(one, other))
    assert (best["position"], best["layer"]) != (own.position, own.layer), "the control: the rules differ here"
    assert {path: path.read_bytes() for path in kept} == kept, "nothing of the run was touched"


def test_what_was_measured_is_kept_and_thresholds_choose_again(folder, capsys):
    asked([str(folder), *RULE], capsys)
    status, found, said = asked([str(folder), "--rule=cosmic", "--kl-max=inf", "--json"], capsys)
    assert "cosmic: done before" in said
    fewer = [row for row in found["survivors"] if row["layer"] >= 4]
    assert not fewer and {row["kl_div_score"] is None for row in found["survivors"]} == {False}
    status, found, _ = asked([str(folder), "--rule=cosmic", "--kl-max=0", "--json"], capsys)
    assert status == 1 and found["survivors"] == [] and "fail by kl" in found["explanation"]
    status, text, _ = asked([str(folder), "--rule=cosmic", "--no-thresholds", "--top=2"], capsys)
    assert status == 0 and "COSMIC, cosines at layer" in text and "published rule: position" in text


def test_what_cannot_be_measured_is_one_line(folder, tmp_path, tiny_model, capsys):
    for words, problem in (
        ([str(folder / "select_direction/direction_evaluations.json")], "name a run folder with scores"),
        ([str(folder), "--n-layers=6"], "without --n-layers"),
        ([str(tmp_path)], "name a run folder with scores"),
    ):
        status, _, said = asked([*words, "--rule=cosmic"], capsys)
        assert status == 2 and problem in said and len(said.strip().splitlines()) == 1
    status, _, said = asked([str(folder), "--rule=cosmik"], capsys)
    assert status == 2 and "--rule takes published or cosmic, not 'cosmik'; did you mean cosmic?" in said


def test_other_weights_are_refused_and_a_record_reads_back(folder, tiny_model):
    model = tiny_model("llama")
    found = cosmic_of_run(RunInputs(model, folder))
    assert found == CosmicRecord(**{name: getattr(found, name) for name in ("layers", "n_layers", "rows")})
    assert len(found.rows) == len(read_json(folder / FILE)["rows"])
    assert torch.tensor([row.total for row in found.rows if row.total is not None]).abs().max() <= 2
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", {**record, "model": {**record["model"], "fingerprint": "0" * 64}})
    with pytest.raises(UserError, match="was computed from other weights"):
        cosmic_of_run(RunInputs(model, folder))
    write_json(folder / "run.json", record)
