"""The published rule, on the published grids and on grids made by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from refusal_mi.errors import UserError
from refusal_mi.files import read_json, write_record
from refusal_mi.run.folder import load_evaluations
from refusal_mi.run.record import BaselineRecord
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.thresholds import NO_THRESHOLDS, Thresholds
from tests.helpers.scores import candidate

FOLDER = Path(__file__).parents[1] / "data" / "published"
PUBLISHED = [
    ("gemma-2b-it", 18, (-2, 10), 13),
    ("qwen-1_8b-chat", 24, (-2, 15), 12),
    ("meta-llama-3-8b-instruct", 32, (-5, 12), 25),
]


def published(run, n_layers):
    return ScoreGrid.load(FOLDER / run / "select_direction" / "direction_evaluations.json", n_layers)


@pytest.mark.parametrize(("run", "n_layers", "winner", "n_survivors"), PUBLISHED)
def test_published_grids_choose_the_published_winners(run, n_layers, winner, n_survivors):
    grid = published(run, n_layers)
    chosen = select(grid)
    assert (chosen.best.position, chosen.best.layer) == winner
    assert read_json(FOLDER / run / "direction_metadata.json") == {"pos": winner[0], "layer": winner[1]}
    assert len(chosen.survivors) == n_survivors
    filtered = read_json(FOLDER / run / "select_direction" / "direction_evaluations_filtered.json")
    assert [row.describe() for row in chosen.survivors] == filtered
    assert len(chosen.survivors) + len(chosen.rejected) == len(grid.rows)


@pytest.mark.parametrize(("run", "n_layers", "winner", "n_survivors"), PUBLISHED)
def test_without_thresholds_others_would_win_on_two_of_three(run, n_layers, winner, n_survivors):
    grid = published(run, n_layers)
    chosen = select(grid, NO_THRESHOLDS)
    assert len(chosen.survivors) == len(grid.rows)
    assert ((chosen.best.position, chosen.best.layer) == winner) == (run == "meta-llama-3-8b-instruct")
    assert chosen.best.bypass == min(row.bypass for row in grid.rows)


def test_the_committed_files_are_the_published_ones(reference_data):
    paths = [path.relative_to(FOLDER) for path in FOLDER.rglob("*.json")]
    assert len(paths) == 3 * len(PUBLISHED)
    for path in paths:
        assert (FOLDER / path).read_bytes() == (reference_data / "reference_runs" / path).read_bytes()


@pytest.mark.parametrize(
    ("n_layers", "cut"), [(18, 14), (24, 19), (26, 20), (28, 22), (32, 25), (40, 32), (60, 48), (80, 64)]
)
def test_the_published_layer_rule(n_layers, cut):
    rows = tuple(candidate(layer) for layer in range(n_layers))
    assert [found.layer for found in select(ScoreGrid(rows, n_layers)).survivors] == list(range(cut))


def test_equality_with_a_threshold_is_kept():
    kept = candidate(kl=0.1, induce=0.0, bypass=3.0)
    lost = (candidate(kl=math.nextafter(0.1, 1)), candidate(induce=-1e-300))
    chosen = select(ScoreGrid((lost[0], kept, lost[1]), 5))
    assert chosen.survivors == (kept,)
    assert [reasons for _, reasons in chosen.rejected] == [("kl",), ("induce",)]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
@pytest.mark.parametrize("name", ["bypass", "induce", "kl"])
def test_a_candidate_without_a_score_never_survives(missing, name):
    chosen = select(ScoreGrid((candidate(**{name: missing}), candidate(bypass=9.0)), 5), NO_THRESHOLDS)
    assert [found.bypass for found in chosen.survivors] == [9.0]
    assert chosen.rejected[0][1] == ("no score",)


def test_ties_keep_the_order_of_the_grid():
    rows = (candidate(1, 2.0), candidate(2, -1.0), candidate(0, -1.0), candidate(3, -1.0, position=-2))
    chosen = select(ScoreGrid(rows, 5))
    assert [found.layer for found in chosen.survivors] == [2, 0, 3, 1]


def test_a_zero_bypass_score_is_a_score():
    rows = (candidate(0, 0.0), candidate(1, -2.0), candidate(2, 1.0))
    assert [found.layer for found in select(ScoreGrid(rows, 5)).survivors] == [1, 0, 2]


def test_when_nothing_survives_the_message_names_what_binds():
    rows = (candidate(kl=5.0), candidate(kl=5.0, induce=-3.0), candidate(4), candidate(kl=None))
    chosen = select(ScoreGrid(rows, 5))
    with pytest.raises(UserError, match="no candidate survives") as caught:
        _ = chosen.best
    assert "2 with KL above the limit (1 only that)" in str(caught.value)
    assert "1 at too late a layer (1 only that)" in str(caught.value)
    assert chosen.explain().startswith("0 of 4 candidates survive")


def test_each_threshold_can_be_switched_off_alone():
    rows = (candidate(kl=9.0), candidate(induce=-9.0), candidate(layer=4))
    for index, name in enumerate(("kl_max", "induce_min", "prune_layers")):
        chosen = select(ScoreGrid(rows, 5), Thresholds(**{name: None}))
        assert chosen.survivors == (rows[index],)


@pytest.mark.parametrize(
    "options",
    [
        {"prune_layers": 1.0},
        {"prune_layers": -0.1},
        {"kl_max": -1.0},
        {"kl_max": math.nan},
        {"induce_min": math.nan},
        {"kl_max": math.inf},
    ],
)
def test_impossible_thresholds_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Thresholds(**options)


def test_published_loss_files_have_the_keys_that_ours_have(reference_data):
    for run, *_ in PUBLISHED:
        for label in ("baseline", "ablation", "actadd"):
            found = json.loads(
                (reference_data / "reference_runs" / run / "loss_evals" / f"{label}_loss_eval.json").read_text()
            )
            for name in ("pile", "alpaca", "alpaca_custom_completions"):
                assert set(found[name]) >= {"ce_loss", "perplexity", "n_tokens"}


def test_where_a_zero_point_was_calibrated_half_of_the_prompts_must_reach_it():
    """One that makes most prompts refuse and leaves a few far below: its mean misses what its median reaches."""
    skewed = replace(candidate(induce=-2.0), median_induce=-0.5)
    shifted = replace(candidate(induce=-0.5), median_induce=-2.0)
    for rows, zero_point, kept in (
        ((skewed, shifted), None, []),
        ((skewed, shifted), -1.0, [skewed]),
        ((skewed, shifted), -0.4, []),
        ((skewed, shifted), -2.0, [skewed, shifted]),
        ((candidate(induce=0.1),), -1.0, [candidate(induce=0.1)]),
    ):
        chosen = select(ScoreGrid(rows, 5, zero_point=zero_point))
        assert list(chosen.survivors) == kept
    assert select(ScoreGrid((skewed,), 5, zero_point=-1.0), Thresholds(induce_min=0.6)).survivors == ()


def test_a_score_file_beside_its_baseline_is_read_with_its_zero_point(tmp_path):
    rows = [replace(candidate(layer=3, induce=-2.0), median_induce=-0.5).describe()]
    (tmp_path / "direction_evaluations.json").write_text(json.dumps(rows))
    assert not select(load_evaluations(tmp_path / "direction_evaluations.json", 5)).survivors
    write_record(tmp_path / "baseline.json", BaselineRecord(1.0, -3.0, 5, zero_point=-1.0))
    assert [row.layer for row in select(load_evaluations(tmp_path / "direction_evaluations.json", 5)).survivors] == [3]
