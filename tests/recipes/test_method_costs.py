"""What a comparison says beside cost: over-refusal, tasks, draws of the training prompts, when prompts were used."""

import json

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction, difference_in_means
from refusal_mi.estimators.repind import dependence
from refusal_mi.files import read_json, read_tensors
from refusal_mi.generation import generate
from refusal_mi.harness.requests import Requests
from refusal_mi.harness.tasks import answer_choices
from refusal_mi.interventions import Ablate
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.reading import mean_activations
from refusal_mi.recipes.spans import NoDirections, Spans
from refusal_mi.run.folder import RunInputs
from refusal_mi.run.methods import MethodsResult
from refusal_mi.text.prompts import load_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built"),
]
N, TOKENS, SIDES = 10, 6, ("harmful", "harmless")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and a file of prompts that the model refuses, some of which the run was made with."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "run"
    few = ["--n-train=48", "--n-val=16", "--n-test=16"]
    assert exit_status(["run", "--steps=directions,selection", "--search=staged", *few, f"--output-dir={path}"]) == 0
    run = RunInputs(load_model(device="cpu"), path, 10**6)
    used = [*run.prompts("harmful", "train")[:5], *run.prompts("harmful", "val")[:5]]
    new = load_prompts("organism_harmful_test")[:N].instructions
    (folder / "refused.json").write_text(json.dumps([*used, *new]))
    return folder, new


def line(folder, *more):
    run = [f"--run={folder / 'run'}", f"--n-prompts={N}", f"--max-new-tokens={TOKENS}", "--n-random=1", "--n-places=1"]
    return ["compare-methods", *run, f"--over-refusal={folder / 'refused.json'}", "--capability=everyday", *more]


@pytest.fixture(scope="module")
def found(place):
    """What was compared, found from two draws."""
    folder, _ = place
    assert exit_status(line(folder, "--methods=peel:2,peel:1", "--seeds=2")) == 0
    return folder / "run/methods", MethodsResult.load(folder / "run/methods")


@pytest.fixture(scope="module")
def run(found):
    return RunInputs(load_model(device="cpu"), found[0].parent, N)


def test_over_refusal_is_that_of_the_answers_and_random_subspaces_leave_it(found, place, run):
    path, result = found
    plain, *rows = result.beside
    assert [row.label for row in rows] == [*(row.label for row in result.rows), "random:1", "random:2"]
    assert plain.over_refusal[1].refused.n == len(place[1]), "the prompts that the run was made with are left out"
    assert plain.over_refusal[1].refused.value > 0.8 and plain.over_refusal[1].change["difference"] == 0
    assert [each.set_name for each in plain.over_refusal] == ["held-out", "refused"]
    for row in rows:
        own, refused = row.over_refusal
        basis = (
            None if row.label.startswith("random") else read_tensors(path / f"{row.label.replace(':', '-')}/basis.pt")
        )
        if basis is None:
            assert refused.change["difference"] > -0.1 and row.strength == 1, "the control"
            continue
        assert refused.change["high"] < -0.1 and row.strength == result.row(row.label).read_at
        steps = Ablate(basis, row.strength)
        for prompts, shown in ((place[1], refused), (run.prompts("harmless"), own)):
            answers = generate(run.model, run.chat, prompts, interventions=steps, max_new_tokens=TOKENS)
            complied = SubstringJudge().complied(prompts, [each.text for each in answers])
            assert (shown.refused.count, shown.refused.n) == (len(prompts) - sum(complied), len(prompts))


def test_tasks_are_those_of_the_ablated_model(found, run):
    path, result = found
    row = next(each for each in result.beside if each.label == "peel:2")
    steps = Ablate(read_tensors(path / "peel-2/basis.pt"), row.strength)
    plain, ablated = (answer_choices(Requests(run.model, None, each)) for each in ((), steps))
    (effect,) = row.capability
    assert effect.before[0] == pytest.approx(sum(plain.values) / 80)
    assert effect.after[0] == pytest.approx(sum(ablated.values) / 80) and effect.n == 80
    assert effect.change[1] <= effect.after[0] - effect.before[0] <= effect.change[2]
    assert effect.largest_nats > 1e-3 and result.beside[0].capability[0].largest_nats == 0, "it does act"


def test_a_draw_is_the_method_on_drawn_training_prompts(found, run):
    path, _ = found
    whole = RunInputs(run.model, run.path, 10**6)
    drawn, prompts = torch.Generator().manual_seed(1), {}
    for side in SIDES:
        kept = whole.prompts(side, "train")
        prompts[side] = kept, [kept[row] for row in torch.randint(len(kept), (len(kept),), generator=drawn).tolist()]
    chosen = read_json(path / "draw-1/mean-1/chosen.json")
    place = chosen["position"], chosen["layer"]
    of_all, own = (
        difference_in_means(*(mean_activations(run.model, run.chat, prompts[side][index]) for side in SIDES))
        .direction(*place)
        .unit
        for index in (0, 1)
    )
    held = read_tensors(path / "draw-1/mean-1/basis.pt")[0]
    assert (held @ own).abs().item() == pytest.approx(1, abs=1e-6)
    assert (held @ of_all).abs().item() < 1 - 1e-5, "the control: all training prompts give another"


def test_the_search_is_not_drawn_again(run, tmp_path):
    spans = Spans(run, 1, lambda label: tmp_path / label)
    with pytest.raises(NoDirections, match="not repeated"):
        spans.of_draw(1).trials("ranks", 1)
    assert len(spans.trials("ranks", 1)) == 1, "the control: of all training prompts"


def test_ratios_over_draws_begin_with_the_run_itself(found):
    _, result = found
    pairs = [(row.label, row.over) for row in result.draws]
    assert pairs == [("peel:2", "mean:1"), ("peel:1", "mean:1"), ("peel:2", "peel:1")]
    by_pair = dict(zip(pairs, result.draws, strict=True))
    for pair, single in (
        (("peel:2", "mean:1"), result.row("peel:2").matched.ratio),
        (
            ("peel:2", "peel:1"),
            result.row("peel:2").over_single,
        ),
    ):
        row = by_pair[pair]
        assert row.ratios[0] == pytest.approx(single[0]) and len(set(row.ratios)) == 2
        assert row.one_fit == (row.ratios[0], None, None), "two draws have no interval"


def test_dependence_is_that_of_the_directions_and_more_than_of_a_random_one(found, run):
    path, result = found
    assert result.dependence_of == ("mean:1", "peel:1", "random:1")
    given = [Direction.of(read_tensors(path / f"{name}-1/basis.pt")[0], 3) for name in ("mean", "peel")]
    table = dependence(run.model, run.chat, given, run.prompts("harmful", "val")[:32])
    assert result.dependent("peel:1") == pytest.approx(max(table[0, 1].item(), table[1, 0].item()), rel=1e-3)
    assert result.dependent("peel:1") > 2 * result.dependent("random:1") and result.dependent("peel:2") is None


def test_held_out_prompts_are_used_once_and_the_file_says_when(found, place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path, result = found
    (first,) = result.opened
    assert first.created and first.methods == ("mean:1", "peel:2", "peel:1") and first.n_draws == 2
    stages = {each: (path / f".stages/{each}.json").stat().st_mtime_ns for each in ("opened", "plain", "peel-1-chosen")}
    drawn = (path / ".stages/draw-1-peel-2-chosen.json").stat().st_mtime_ns
    assert max(stages["peel-1-chosen"], drawn) < stages["opened"] < stages["plain"]
    before = read_json(path / "methods.json")
    (path / ".stages/opened.json").unlink()
    (path / "draw-1/peel-2/held_out.json").unlink()
    assert exit_status(line(place[0], "--methods=peel:2,peel:1", "--seeds=2")) == 0
    assert read_json(path / "methods.json") == before, "the same choice is no second use"
    shown = capsys.readouterr().out
    for part in ("over-refusal and tasks", "everyday", "nothing can be lost", "random:2", "2 draws of", "dependence"):
        assert part in shown
    assert all(len(each) <= 80 for each in shown.splitlines() if each.startswith(("│", "┃", "┏", "└", "┡", "├")))
    assert "held-out: the plain model refuses none" in shown
    assert "KL: over 1 token" in shown and "whole" in shown
    assert "Plotly.newPlot" in (path / "beside.html").read_text(encoding="utf-8")


def test_methods_that_are_added_later_are_a_second_use(place, capsys):
    other = place[0] / "run/other"
    quick = line(place[0], f"--output-dir={other}")
    quick = [each for each in quick if not each.startswith(("--over", "--capa", "--n-prom"))] + ["--n-prompts=4"]
    assert exit_status([*quick, "--methods=mean"]) == 0
    for created, methods in (
        ([None, "now"], [("mean:1",), ("mean:1", "median:1")]),
        ([None], [("mean:1", "median:1")]),
    ):
        (other / "opened.json").unlink()  # a folder of before there was one
        (other / ".stages/opened.json").unlink()
        assert exit_status([*quick, "--methods=mean,median"]) == 0
        opened = MethodsResult.load(other).opened
        assert [each.methods for each in opened] == methods
        assert [each.created and "now" for each in opened] == created
        assert ("chosen again by" in capsys.readouterr().out) == (len(created) > 1)


def test_a_file_of_before_is_read(found, tmp_path):
    old = read_json(found[0] / "methods.json")
    for key in ("opened", "beside", "draws", "dependence", "dependence_of"):
        del old[key]
    (tmp_path / "methods.json").write_text(json.dumps(old))
    read = MethodsResult.load(tmp_path)
    assert read.rows == found[1].rows and read.beside == () and read.dependent("peel:1") is None


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--seeds=0", "--seeds"),
        ("--over-refusal=xtest", "did you mean 'xstest'"),
        ("--over-refusal=harmless,harmless", "each once"),
        ("--over-refusal=xstest,harmful", "harmful is one of harmful ones"),
        ("--over-refusal=organism_harmful_test", "takes sets of harmless prompts"),
        ("--capability=everyday,everyday", "each once"),
    ],
)
def test_options_that_make_no_sense_are_one_line(place, option, says, capsys):
    assert exit_status([*line(place[0]), option]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and says in said


def test_a_set_of_training_prompts_alone_is_refused(place, run, capsys):
    (place[0] / "train.json").write_text(json.dumps(run.prompts("harmful", "train")))
    assert exit_status([*line(place[0]), f"--over-refusal={place[0] / 'train.json'}"]) == 2
    assert "found its direction with all of these prompts" in capsys.readouterr().err
