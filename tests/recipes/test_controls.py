"""The controls beside the chosen direction: what they are, and that one of them could fail."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.files import read_json, read_record
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import kl_nats, next_token_logits, refusal_scores
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.reading import mean_activations
from refusal_mi.recipes.arditi import run
from refusal_mi.recipes.context import RunContext
from refusal_mi.recipes.controls import N_HALVES, N_RANDOM, halves, shares_of_stream
from refusal_mi.recipes.prompts import prepare
from refusal_mi.report.page import write_report
from refusal_mi.report.verdict import judge_run
from refusal_mi.run.folder import RunRecord, load_grid, load_scores
from refusal_mi.run.options import RunOptions
from refusal_mi.run.record import CONTROLS, ControlsRecord
from refusal_mi.run.stages import RunFolder
from refusal_mi.search.thresholds import NO_THRESHOLDS
from tests.helpers.directions import random_direction
from tests.helpers.models import D_MODEL

pytestmark = pytest.mark.slow

SMALL = RunOptions(
    n_train=9,
    n_val=3,
    n_test=3,
    filter_prompts=False,
    refusal_tokens=(5, 40),
    response_prefix="",
    thresholds=NO_THRESHOLDS,
    steps=("directions", "selection"),
    batch_size=16,
)


@pytest.fixture(scope="module")
def ran(tiny_dir, tmp_path_factory):
    """A prepared run of a tiny model, its direction and its controls."""
    source, path = str(tiny_dir("llama").resolve()), tmp_path_factory.mktemp("run")
    model = load_model(source, device="cpu")
    run(model, source, SMALL, RunFolder(path))
    prepared = prepare(RunContext.start(model, source, SMALL, RunFolder(path)))
    return prepared, Direction.load(path / "direction.pt"), read_record(path / CONTROLS, ControlsRecord).rows


def test_the_share_of_the_stream_is_what_ablation_removes():
    streams = torch.randn(40, D_MODEL, dtype=torch.float64)
    directions = [random_direction(seed=seed) for seed in range(3)]
    shares = shares_of_stream(streams, directions)
    for share, direction in zip(shares, directions, strict=True):
        left = streams - (streams @ direction.unit)[:, None] * direction.unit
        expected = 1 - left.square().sum(-1) / streams.square().sum(-1)
        assert share == pytest.approx(expected.mean().item(), abs=1e-12)
    basis = [replace(directions[0], vector=row) for row in torch.eye(D_MODEL)]
    assert shares_of_stream(streams, basis).sum() == pytest.approx(1), "an orthonormal basis takes all of it"


def test_every_kind_is_there_and_the_choice_has_the_scores_of_the_search(ran):
    prepared, _, rows = ran
    kinds = [row.kind for row in rows]
    assert kinds == ["chosen"] + ["random"] * N_RANDOM + ["within harmful"] * N_HALVES + ["within harmless"] * N_HALVES
    best = read_json(prepared.path / "summary.json")["selection"]["best"]
    assert (rows[0].bypass, rows[0].induce) == pytest.approx((best["refusal_score"], best["steering_score"]), abs=1e-6)
    assert rows[0].kl_nats == pytest.approx(best["kl_div_score"], abs=1e-7)


def test_halves_are_differences_within_one_class_of_the_norm_of_the_choice(ran):
    prepared, direction, _ = ran
    named = halves(prepared, direction)
    prompts = prepared.kept("harmless", "train")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(SMALL.seed + 1)).tolist()
    means = [
        mean_activations(prepared.model, prepared.chat, [prompts[index] for index in half]).means
        for half in (order[:4], order[4:])
    ]
    row = prepared.chat.positions.index(direction.position)
    expected = (means[0] - means[1])[row, direction.layer]
    kind, seed, found = named[-1]
    assert (kind, seed) == ("within harmless", 1)
    assert torch.allclose(found.unit, expected / expected.norm(), atol=1e-5)
    assert [each.norm for *_, each in named] == pytest.approx([direction.norm] * len(named), rel=1e-5)
    assert abs(named[-1][2].unit @ named[-2][2].unit) < 0.999, "another seed, other halves"


def test_their_scores_are_those_of_one_plain_pass_each(ran):
    prepared, direction, rows = ran
    model, chat = prepared.model, prepared.chat
    harmful, harmless = prepared.kept("harmful", "val"), prepared.kept("harmless", "val")
    controls = [direction.random_like(seed) for seed in range(N_RANDOM)] + [
        each for *_, each in halves(prepared, direction)
    ]
    for row, control in zip(rows[1:], controls, strict=True):
        ablated, added = [Ablate([control])], [Add(control)]
        bypass = refusal_scores(model, chat, harmful, SMALL.refusal_tokens, interventions=ablated).mean().item()
        induce = refusal_scores(model, chat, harmless, SMALL.refusal_tokens, interventions=added).mean().item()
        plain, changed = (next_token_logits(model, chat, harmless, interventions=some) for some in ((), ablated))
        assert (row.bypass, row.induce) == pytest.approx((bypass, induce), abs=1e-5)
        assert row.kl_nats == pytest.approx(kl_nats(plain, changed).mean().item(), abs=1e-6)


def test_scores_by_one_formula_of_kl_are_not_taken_for_the_others(ran, tmp_path):
    """The same folder with the published calibration and back: scores and controls are measured again, by its KL."""
    prepared, source = ran[0], ran[0].model_record.source
    harmless = prepared.kept("harmless", "val")
    plain = next_token_logits(prepared.model, prepared.chat, harmless)
    grid = load_grid(prepared.path)
    for calibration, formula in (("labels", "exact"), ("published", "published"), ("labels", "exact")):
        summary = run(prepared.model, source, replace(SMALL, calibration=calibration), RunFolder(tmp_path))
        rows = [row for row in load_scores(tmp_path).rows if row.kl_nats is not None][:12]
        directions = [grid.direction(row.position, row.layer) for row in rows]
        directions += [Direction.load(tmp_path / "direction.pt").random_like(seed) for seed in range(N_RANDOM)]
        found = [row.kl_nats for row in (*rows, *(row for row in summary.controls if row.kind == "random"))]
        changed = [
            next_token_logits(prepared.model, prepared.chat, harmless, interventions=[Ablate([each])])
            for each in directions
        ]
        right, wrong = (
            [kl_nats(plain, each, one).mean().item() for each in changed]
            for one in (formula, "published" if formula == "exact" else "exact")
        )
        assert found == pytest.approx(right, abs=1e-6)
        apart = [abs(a - b) > 5e-6 for a, b in zip(right, wrong, strict=True)]
        assert any(apart[: len(rows)]) and any(apart[len(rows) :]), "the control: the other formula would be seen"


def test_the_report_shows_them(ran):
    path = ran[0].path
    page = write_report(path).read_text(encoding="utf-8")
    assert "halves of harmless prompts" in page and "The chosen direction beside others" in page
    summary = RunRecord.load(path).summary
    assert summary is not None and len(summary.controls) == 1 + N_RANDOM + 2 * N_HALVES


@pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")
def test_on_the_embedded_model_the_direction_alone_stops_refusal_though_a_control_removes_nearly_as_much(tmp_path):
    sizes = ["--n-test=4", "--n-ce=4", "--max-new-tokens=8", "--search=staged"]
    assert exit_status(["run", *sizes, "--output-dir", str(tmp_path / "run")]) == 0
    record = RunRecord.load(tmp_path / "run")
    assert record.summary is not None
    chosen, *others = record.summary.controls
    assert chosen.bypass < -5 and chosen.induce > 0
    assert all(row.bypass > 0 and row.induce < -2 for row in others)
    random = [row.share_of_stream for row in others if row.kind == "random"]
    within = [row.share_of_stream for row in others if row.kind != "random"]
    assert max(random) < 0.1 * chosen.share_of_stream, "an isotropic one can hardly fail"
    assert max(within) > 0.25 * chosen.share_of_stream, "these could"
    (said,) = [text for text in judge_run(record).sentences if "random halves of one class" in text]
    assert f"{chosen.share_of_stream:.1%} of the stream is removed" in said
