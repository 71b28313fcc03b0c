"""The least intervention of a run of the embedded model: found, measured on held-out prompts, exported as it says."""

import json
import math

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.files import read_json, write_json
from refusal_mi.interventions import Ablate
from refusal_mi.measures import kl_nats, next_token_logits
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.recipes.localize import LeastIntervention, source_directions
from refusal_mi.run.folder import RunInputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")]
N = 40


@pytest.fixture(scope="module")
def localized(tmp_path_factory):
    """A run folder, what localize found in it, and what the command printed."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert exit_status(["run", "--steps=directions,selection", "--search=staged", f"--output-dir={path}"]) == 0
    assert exit_status(["localize", f"--run={path}", f"--n-prompts={N}", "--max-new-tokens=24", "--n-random=2"]) == 0
    return path, LeastIntervention.load(path / "localize")


def test_it_costs_a_fraction_and_stops_as_many_refusals(localized):
    _, found = localized
    plain, whole, least = (found.row(label) for label in ("plain", "whole", "least"))
    assert plain.refused_by_text.value > 0.9 and whole.refused_by_text.value < 0.1
    assert found.text_change["low"] <= 0 and least.refused_by_text.value < 0.15 and least.degenerate.value <= 0.05
    assert least.kl_nats[0] <= 0.002 and found.kl_ratio[2] < 0.5
    for seed in range(2):
        assert found.row(f"random {seed}").refused_by_score.value > 0.9, "the control: the same writes"
    assert whole.kl_nats[0] > 0.004, "and the cost that is saved is there"
    assert found.least.n_refused_text <= found.whole.n_refused_text
    assert len(found.measured) > 20 and found.n_tried > len(found.measured)


def test_the_numbers_are_those_of_the_ablation_that_it_names(localized):
    path, found = localized
    run = RunInputs(load_model(device="cpu"), path, N)
    direction, least = Direction.load(path / "localize/direction.pt"), found.least
    ablation = Ablate(direction, least.strength, range(least.first, least.last), least.components)
    prompts = run.prompts("harmless")
    plain = next_token_logits(run.model, run.chat, prompts)
    changed = next_token_logits(run.model, run.chat, prompts, interventions=ablation)
    assert found.row("least").kl_nats[0] == pytest.approx(kl_nats(plain, changed).mean().item(), rel=1e-3)
    sources = source_directions(run, 4)
    assert sources[0].layer == run.direction.layer and 1 < len(sources) <= 4
    units = torch.stack([each.unit for each in sources])
    assert (units @ units.T).fill_diagonal_(0).max() < 0.999999


def test_it_exports_as_the_command_says(localized, tmp_path, capsys):
    path, found = localized
    least, out = found.least, tmp_path / "out"
    line = ["export", "--direction", str(path / "localize/direction.pt"), "--layers", f"{least.first}:{least.last}"]
    line += ["--components", ",".join(least.components), "--strength", f"{least.strength:g}", "--output-dir", str(out)]
    assert exit_status(line) == 0 and "within the limits" in " ".join(capsys.readouterr().out.split())
    exported = load_model(out, device="cpu")
    run = RunInputs(load_model(device="cpu"), path, N)
    prompts = run.prompts("harmless")
    kl = kl_nats(*(next_token_logits(model, run.chat, prompts) for model in (run.model, exported))).mean().item()
    assert kl == pytest.approx(found.row("least").kl_nats[0], rel=0.02)


def test_its_figures_and_its_file(localized):
    folder = localized[0] / "localize"
    for name in ("front", "writes"):
        assert "Plotly.newPlot" in (folder / f"{name}.html").read_text(encoding="utf-8")
    record = read_json(folder / "localize.json")
    assert all(math.isfinite(row["kl_nats"]) for row in record["writes"]) and len(record["writes"]) == 21
    write_json(folder.parent / "broken.json", {**record, "least": {"first": "x"}})
    with pytest.raises(Exception, match="least"):
        LeastIntervention.load(folder.parent / "broken.json")
    assert json.loads(json.dumps(record))["n_layers"] == 10


@pytest.mark.parametrize("option", ["--kl-tokens=0", "--n-prompts=1", "--n-directions=0"])
def test_options_that_make_no_sense_are_one_line(localized, option, capsys):
    assert exit_status(["localize", f"--run={localized[0]}", option]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
