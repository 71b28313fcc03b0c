"""The exact search of a few candidates: whether the staged one chooses alike, and what follows from its ranks."""

import shutil

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.directions import cosine
from refusal_mi.run.answers import SIDES
from refusal_mi.run.folder import RunInputs, RunRecord
from refusal_mi.search.grid import select
from refusal_mi.search.staged import staged_sweep
from tests.helpers.real import FEW, QWEN, run_search

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder(real_dir, qwen_run, tmp_path_factory):
    """Ten candidates from the prompts of the shared run, scored exactly; two of them ablated one after the other."""
    copy = shutil.copytree(qwen_run.folder, tmp_path_factory.mktemp("exact") / "run")
    pair = ["--directions", "0-1", "--multi", "sequential", "--steps", "directions,selection,loss"]
    ranked = ["--estimator", "tests.helpers.real:few", "--kl-max", "inf", "--induce-min=-inf"]
    assert run_search(real_dir(QWEN), copy, *ranked, *pair, search="exact").status == 0
    return copy


def test_staged_and_exact_search_choose_alike(folder, qwen_run, qwen):
    run, rule = RunInputs(qwen, folder), RunRecord.load(qwen_run.folder).thresholds
    prompts = [run.prompts(side, "val") for side in SIDES]
    zero = run.record.zero_point_nats
    searched = qwen, run.chat, run.grid, *prompts, run.record.prefixes
    staged = staged_sweep(*searched, thresholds=rule, zero_point=zero)
    best = [select(scores, rule).best for scores in (staged, run.scores)]
    a, b = (run.grid.direction(row.position, row.layer) for row in best)
    assert cosine(a, b) >= 0.95
    others = [run.grid.direction(*place) for place in FEW]
    assert min(cosine(a, each) for each in others) < 0.95
    n_staged, n_exact = (sum(row.is_finite for row in scores.rows) for scores in (staged, run.scores))
    assert n_staged < n_exact == len(FEW)


def test_directions_ablated_one_after_the_other_are_not_exported(folder, real_dir, tmp_path, capsys):
    asked = ["export", str(real_dir(QWEN)), "--output-dir", str(tmp_path / "out"), "--direction"]
    assert exit_status([*asked, str(folder / "0-1-sequential")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one direction after the other" in line and not (tmp_path / "out").exists()
