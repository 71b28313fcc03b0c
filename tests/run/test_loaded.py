"""A run folder as one object: what its readers read, under the names that people ask for."""

import math

import pytest
import torch

from refusal_mi import load_run
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.figures.scores import plot_scores
from refusal_mi.files import read_json, write_json
from refusal_mi.loaded import FIGURES
from tests.helpers.runs import finished_run, make_run, make_scores, write_span


@pytest.fixture
def folder(tmp_path):
    """A finished run with its tensors."""
    return finished_run(tmp_path / "x")


def test_a_run_gives_what_its_files_hold(folder):
    run = load_run(str(folder))
    assert run.status == "done" and run.path == folder
    assert run.direction == Direction.load(folder) and run.directions == (run.direction,)
    assert torch.equal(run.grid.direction(run.direction.position, run.direction.layer).vector, run.direction.vector)
    expected = make_scores()
    assert [row.bypass for row in run.scores.rows] == [row.bypass for row in expected.rows]
    best = run.selection.best
    assert (best.position, best.layer) == (run.direction.position, run.direction.layer)
    assert run.ranked(0)[0].vector.tolist() == run.direction.vector.tolist()
    assert torch.equal(run.ranked(1, 0)[1].vector, run.direction.vector)


def test_rates_completions_and_losses_are_tables(folder):
    run = load_run(folder)
    answers = run.completions("harmful", "ablation")
    rows = read_json(folder / "completions/harmful_ablation_evaluations.json")["completions"]
    assert [each.response for each in answers.answers] == [row["response"] for row in rows]
    refusal = run.rates["harmful"].find("ablation").refusal
    assert refusal == answers.refusal and refusal != run.completions().refusal  # the plain model's
    table = run.rates.to_frame()
    row = table[(table.side == "harmful") & (table.label == "ablation") & (table.rate == "refusal")]
    assert row["value"].item() == refusal.value and row["low"].item() == refusal.interval[0]
    assert answers.to_frame()["is_refused"].mean() == pytest.approx(refusal.value)
    assert run.losses["ablation"]["plain_text"].ce_loss == pytest.approx(2.112)
    losses = run.losses.to_frame()
    assert len(losses) == 12 and losses["perplexity"].tolist() == pytest.approx(
        [math.exp(x) for x in losses["ce_loss"]]
    )
    assert "ablation" in run.losses and "abliation" not in run.losses and run.rates.get("nobody") is None
    kept = [row for row in read_json(folder / "prompts.json")["harmful"]["val"] if row["kept"]]
    assert len(run.prompts("harmful", "val")) == len(kept) > 0
    assert run.prompts("harmless").instructions == ["Do something"]


def test_combinations_are_runs_of_their_own(folder):
    write_span(folder / "0-1", (0, 1), "span", (1.0, 2.0))
    write_json(folder / "0-1/directions_metadata.json", [{"pos": -1, "layer": 4}, {"pos": -2, "layer": 4}])
    run = load_run(folder)
    assert list(run.combinations) == ["0-1"] and run.combos is None
    both = run.combinations["0-1"]
    assert len(both.directions) == 2 and torch.equal(both.directions[0].vector, run.direction.vector)
    assert both.path == folder / "0-1"
    with pytest.raises(UserError, match=r"ablates several directions together: load_run\(\.\.\.\)\.directions"):
        both.direction  # noqa: B018


@pytest.mark.parametrize("part", ["direction", "grid", "scores", "selection"])
def test_what_a_run_did_not_reach_is_one_line_that_names_its_status(tmp_path, part):
    run = load_run(make_run(tmp_path, reached="directions"))
    with pytest.raises(UserError, match="its run is directions only"):
        getattr(run, part)
    assert len(run.rates) == len(run.losses) == len(run.combinations) == 0
    with pytest.raises(UserError, match="has no completions of harmful prompts"):
        run.completions()


def test_a_mistyped_name_gets_the_near_one(folder, tmp_path):
    run = load_run(folder)
    for ask, near in (
        (lambda: run.completions("harmful", "abliation"), "did you mean 'ablation'"),
        (lambda: run.completions("harmfull"), "did you mean 'harmful'"),
        (lambda: run.prompts("harmful", "tests"), "did you mean 'test'"),
        (lambda: run.losses["baselin"], "did you mean 'baseline'"),
        (lambda: run.rates["harmles"], "did you mean 'harmless'"),
    ):
        with pytest.raises(UserError, match=near):
            ask()
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path / "nothing")


def test_nothing_is_read_before_it_is_asked_for_and_all_of_it_is_short(folder):
    run = load_run(folder)
    (folder / "direction.pt").write_bytes(b"damaged")
    assert run.status == "done" and len(run.scores.rows) > 0
    with pytest.raises(UserError, match=r"direction\.pt"):
        run.direction  # noqa: B018
    fresh = load_run(make_run(folder.parent / "again"))
    for name in ("rates", "losses", "scores", "selection"):
        assert len(repr(getattr(fresh, name))) < 1500 and "<table>" in getattr(fresh, name)._repr_html_()


def test_a_run_says_what_it_found(folder):
    text = repr(load_run(folder))
    for told in (str(folder), "done", "Direction(layer", "candidates survive", "refused, harmful"):
        assert told in text
    assert len(text) < 1500 and "<table>" in load_run(folder)._repr_html_()


def test_the_figures_of_a_run_are_those_of_its_numbers(folder):
    run = load_run(folder)
    assert list(run.figures) == list(FIGURES) and len(run.figures) == 6
    for name in FIGURES:
        assert run.figures[name].data, name
    baseline = run.losses["baseline"]["plain_text"].ce_loss
    changes = {round(table["plain_text"].ce_loss - baseline, 6) for table in run.losses.values()}
    assert changes & {round(value, 6) for trace in run.figures["loss"].data for value in trace.y} - {0.0}
    assert run.figures["kl"] == plot_scores(run.scores, measure="kl", **_how(run)) != run.figures["induce"]
    with pytest.raises(UserError, match=r"unknown figure 'rate'; did you mean 'rates'\?"):
        run.figures["rate"]


def _how(run):
    rule, tokens = run.record.thresholds, run.record.tokens
    return {"chosen": run.selection.best, "thresholds": rule, "tokens": tokens, "model": run.record.model_name}


def test_a_run_without_numbers_has_no_such_figures(tmp_path):
    run = load_run(make_run(tmp_path / "y", reached="selection"))
    assert "rates" not in list(run.figures) and "loss" not in list(run.figures)
    with pytest.raises(UserError, match="has no judged completions"):
        run.figures["rates"]
