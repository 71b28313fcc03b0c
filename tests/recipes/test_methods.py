"""Methods compared in a run of the embedded model: what is removed, what it costs, what is kept when it is killed."""

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.estimators.names import parse_methods
from refusal_mi.files import read_json, read_tensors
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.measures import kl_nats, next_token_logits, refusal_scores
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.reading import mean_activations
from refusal_mi.run.folder import RunInputs, load_ranked
from refusal_mi.run.methods import MethodsResult
from refusal_mi.search.grid import select
from refusal_mi.search.localize import expected_refused

N = 24
MINE, ONE = (f"tests.recipes.test_methods:{name}" for name in ("backwards", "on_one_layer"))
LINE = [
    f"--methods=mean,ranks:1,ranks:2,peel:2,category:2,category:9,{MINE}",
    f"--n-prompts={N}",
    "--max-new-tokens=8",
    "--n-random=2",
]
LINE += ["--n-places=2"]
on_the_embedded = pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")


def backwards(harmful, harmless):
    """A user's own: the difference of means the other way round, which spans the same line."""
    from refusal_mi.directions import difference_in_means

    return difference_in_means(harmless, harmful)


def on_one_layer(harmful, harmless):
    """Nothing but the difference of means of layer 3, as directions that were fitted are given."""
    from refusal_mi.directions import DirectionGrid, difference_in_means

    direction = difference_in_means(harmful, harmless).direction(-1, 3)
    return DirectionGrid.of(direction, harmful.positions, harmful.means.shape[1])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run folder and what was compared in it."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert exit_status(["run", "--steps=directions,selection", "--search=staged", f"--output-dir={path}"]) == 0
    assert exit_status(["compare-methods", f"--run={path}", *LINE]) == 0
    return path, MethodsResult.load(path / "methods")


@pytest.mark.slow
@on_the_embedded
def test_all_stop_refusals_and_the_controls_do_not(compared):
    _, found = compared
    assert [row.label for row in found.rows] == ["mean:1", "ranks:1", "peel:2", "category:2", f"{MINE}:1"]
    few = "9 categories were asked for, and the harmful prompts have 8"
    assert found.skipped == {"ranks:2": "the search has 1 survivor(s)", "category:9": few}
    assert found.plain_refused_by_text.value > 0.9 and found.n_held_out == N
    for row in found.rows:
        assert row.at(0.0).refused.value > 0.9 and row.at(0.0).kl_nats[0] < 1e-9
        assert row.at(1.0).refused.value <= 0.1 and 0 < row.matched.strength <= 1.2
        kl = [each.kl_nats[0] for each in row.curve]
        assert kl == sorted(kl) and kl[1] < row.matched.kl_nats < kl[-1]
    assert {each.k for each in found.controls} == {1, 2} and len(found.controls) == 2 * (2 + 2)
    assert all(each.refused_by_score > 0.7 for each in found.controls if each.label == "random")
    assert min(each.kl_nats for each in found.controls) > 1e-5, "they do change the model"


@pytest.mark.slow
@on_the_embedded
def test_the_numbers_are_those_of_the_ablations(compared):
    path, found = compared
    run = RunInputs(load_model(device="cpu"), path, N)
    assert found.row("mean:1").matched.ratio == (1.0, 1.0, 1.0)
    assert found.row(f"{MINE}:1").matched.ratio == pytest.approx((1, 1, 1), abs=1e-3), "the same line costs the same"
    row, train = found.row("mean:1"), {side: run.record.side(side).kept("train") for side in ("harmful", "harmless")}
    means = [mean_activations(run.model, run.chat, each) for each in train.values()]
    own = difference_in_means(*means).direction(row.position, row.layer).unit
    held = read_tensors(path / "methods/mean-1/basis.pt")[0]
    assert (held @ own).abs().item() == pytest.approx(1, abs=1e-6)
    elsewhere = difference_in_means(*means).direction(row.position, row.layer + 1).unit
    assert (held @ elsewhere).abs().item() < 0.999, "the control: the next layer's is another one"
    span = Ablate(load_ranked(path, (0,)), 0.8)
    harmful, harmless = run.prompts("harmful"), run.prompts("harmless")
    plain, changed = (next_token_logits(run.model, run.chat, harmless, interventions=each) for each in ((), span))
    at = next(each for each in found.row("ranks:1").curve if each.strength == 0.8)
    assert at.kl_nats[0] == pytest.approx(kl_nats(plain, changed).mean().item(), rel=1e-3)
    answers = generate(run.model, run.chat, harmful, interventions=span, max_new_tokens=run.options.label_tokens)
    complied = SubstringJudge().complied(harmful, [each.text for each in answers])
    assert at.refused.count == sum(not each for each in complied)
    basis = read_tensors(path / "methods/peel-2/basis.pt")
    assert torch.allclose(basis @ basis.T, torch.eye(2, dtype=basis.dtype), atol=1e-6)
    table = torch.tensor(found.overlaps)
    assert torch.allclose(table.diag(), torch.ones(5, dtype=table.dtype), atol=1e-6) and torch.allclose(table, table.T)
    assert table[0, 4] > 1 - 1e-6 and table[0, 2] < 0.99
    assert len(found.to_frame()) == sum(len(row.curve) for row in found.rows) > 5 * 7
    near = [each.strength for each in row.curve if abs(each.strength - row.matched.strength) < 0.03]
    assert near, "it was measured where it is matched"


@pytest.fixture(scope="module")
def everywhere(compared):
    """The same run, every layer tried."""
    path, line = compared[0], [f"--methods={ONE}", "--n-places=9", *LINE[1:-1]]
    assert exit_status(["compare-methods", f"--run={path}", *line, f"--output-dir={path / 'other'}"]) == 0
    return path, MethodsResult.load(path / "other")


@pytest.mark.slow
@on_the_embedded
def test_the_place_is_the_best_of_all_on_validation_prompts_and_not_on_held_out_ones(everywhere):
    path, found = everywhere
    run, row = RunInputs(load_model(device="cpu"), path, 10**6), found.row("mean:1")
    means = [mean_activations(run.model, run.chat, run.prompts(side, "train")) for side in ("harmful", "harmless")]
    grid, own = difference_in_means(*means), run.direction
    places = {own.layer: own.position}
    for survivor in select(run.scores, run.options.thresholds).survivors:
        places.setdefault(survivor.layer, survivor.position)
    nearest = sorted(range(grid.n_layers), key=lambda layer: abs(layer - own.layer))
    places = dict(list({**places, **{each: places.get(each, own.position) for each in nearest}}.items())[:9])
    harmful, harmless = run.prompts("harmful", "val"), run.prompts("harmless", "val")
    plain = next_token_logits(run.model, run.chat, harmless)

    def measured(direction):
        steps = Ablate(direction)
        scores = refusal_scores(run.model, run.chat, harmful, run.refusal_prefixes, interventions=steps)
        changed = next_token_logits(run.model, run.chat, harmless, interventions=steps)
        return expected_refused(scores, run.record.zero_point_nats).item(), kl_nats(plain, changed).mean().item()

    left = measured(own)[0] + 0.5 / len(harmful)
    rows = {position: index for index, position in enumerate(grid.positions)}
    there = [(layer, position) for layer, position in places.items() if grid.vectors[rows[position], layer].any()]
    at = {(position, layer): measured(grid.direction(position, layer)) for layer, position in there}
    cost = {place: (max(0.0, refused - left), kl) for place, (refused, kl) in at.items()}
    assert len(at) >= 8 and (row.position, row.layer) == min(cost, key=cost.get)
    assert cost[own.position, own.layer][0] == 0, "the run's own direction is as good as itself"
    chosen = read_json(path / "other/mean-1/chosen.json")
    assert chosen["kl_nats"] == pytest.approx(at[row.position, row.layer][1], rel=1e-3)
    assert chosen["expected"] == pytest.approx(at[row.position, row.layer][0], abs=1e-4)
    order = sorted(cost.values())
    assert order[1] > (order[0][0], 1.01 * order[0][1]), "the control: no other is as good"
    assert chosen["kl_nats"] != pytest.approx(row.at(1.0).kl_nats[0], rel=1e-3), "the control: held-out KL differs"


@pytest.mark.slow
@on_the_embedded
def test_a_function_of_all_layers_is_read_at_the_place(everywhere):
    row = everywhere[1].row(f"{ONE}:1")
    assert row.layer == 3 and row.at(1.0).refused.value <= 0.1


@pytest.mark.slow
@on_the_embedded
def test_what_was_killed_goes_on_to_the_same_numbers(compared, capsys):
    path, _ = compared
    folder = path / "methods"
    before = read_json(folder / "methods.json")
    for name in ("methods.json", "peel-2/answers.json", "ranks-1/held_out.json"):
        (folder / name).unlink()
    assert exit_status(["compare-methods", f"--run={path}", *LINE]) == 0
    again, said = read_json(folder / "methods.json"), capsys.readouterr()
    assert again == before
    lines = (said.err + said.out).splitlines()
    kept = [line.partition(":")[0] for line in lines if "done before" in line]
    assert "mean-1-held-out" in kept and "peel-2-answers" not in kept and "ranks-1-held-out" not in kept
    for name in ("cost", "ratios"):
        assert "Plotly.newPlot" in (folder / f"{name}.html").read_text(encoding="utf-8")


def test_methods_are_read_as_they_are_written():
    assert parse_methods("dim, peel", 2) == (("mean", 1), ("peel", 1), ("peel", 2))
    assert parse_methods("kmeans:3,ranks:2,mine.py:fit", 4) == (("kmeans", 3), ("ranks", 2), ("mine.py:fit", 1))
    assert len(parse_methods("kmeans", 9)) == 4, "there are four clusters"
    assert parse_methods("rdo,cone:2", 4) == (("rdo", 1), ("cone", 2))
    for text, what in (
        ("", "names no method"),
        ("peel:0", "1 to 16"),
        ("mean:2", "has one direction"),
        ("rdo:2", "has one direction"),
        ("mean:foo", "has one direction"),
        (":f", "has one direction"),
        ("meen", "did you mean mean"),
        ("kmeans:5", "1 to 4"),
    ):
        with pytest.raises(UserError, match=what):
            parse_methods(text, 4)


@pytest.mark.slow
@on_the_embedded
@pytest.mark.parametrize("option", ["--methods=nothing", "--n-prompts=1", "--kl-tokens=0", "--n-places=0"])
def test_options_that_make_no_sense_are_one_line(compared, option, capsys):
    assert exit_status(["compare-methods", f"--run={compared[0]}", option]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
