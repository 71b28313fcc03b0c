"""The search: every score recomputed prompt by prompt with plain HF forward hooks."""

import json

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.files import write_json
from refusal_mi.measures import RefusalPrefixes
from refusal_mi.search.grid import ScoreGrid
from refusal_mi.search.sweep import sweep, sweep_token_sets
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import grid_of
from tests.helpers.models import N_LAYERS
from tests.helpers.naive import (
    ASKS,
    CHATS,
    FAMILIES,
    ablating,
    adding,
    dtype_of,
    logits,
    mean_residuals,
    prompt_ids,
    tolerance,
)
from tests.helpers.scores import TOKENS, kl_by_hand, score_by_hand
from tests.helpers.tiers import first_is_fast

HARMFUL, HARMLESS = ASKS[:3], CHATS[:2]


def candidates(model):
    chat = ChatFormat(model.tokenizer)
    return chat, grid_of(model, chat, ASKS, CHATS)


def naive_scores(hf, tokenizer, vector, layer) -> tuple[float, float, float]:
    harmful, harmless = ([prompt_ids(tokenizer, text) for text in texts] for texts in (HARMFUL, HARMLESS))
    plain = [logits(hf, row)[-1] for row in harmless]
    with ablating(hf, vector):
        bypass = [score_by_hand(logits(hf, row)[-1], TOKENS) for row in harmful]
        kl = [kl_by_hand(base, logits(hf, row)[-1]) for base, row in zip(plain, harmless, strict=True)]
    with adding(hf, layer, vector):
        induce = [score_by_hand(logits(hf, row)[-1], TOKENS) for row in harmless]
    return sum(bypass) / 3, sum(induce) / 2, sum(kl) / 2


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_every_score_equals_plain_hf_hooks_prompt_by_prompt(family, tiny_model, plain_model):
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    chat, grid = candidates(model)
    scores = sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS, batch_size=2)
    assert [(row.position, row.layer) for row in scores.rows] == grid.candidates()
    expected_grid = mean_residuals(hf, chat.tokenizer, ASKS, 5) - mean_residuals(hf, chat.tokenizer, CHATS, 5)
    rel = 1e-6 if family == "gpt2" else 1e-4  # candidates are stored in float32
    for index in (1, 8, 14, 17, 23):
        row = scores.rows[index]
        vector = expected_grid[grid.positions.index(row.position), row.layer].float()
        expected = naive_scores(hf, chat.tokenizer, vector, row.layer)
        assert (row.bypass, row.induce, row.kl_nats) == pytest.approx(expected, rel=rel, abs=1e-7), row
    assert len({round(row.bypass, 6) for row in scores.rows if row.is_finite}) > 10


@pytest.mark.parametrize("family", first_is_fast(["gpt2"]))
def test_with_the_same_vectors_the_scores_are_exact_in_float64(family, tiny_model, plain_model):
    model, hf = tiny_model(family, "float64"), plain_model(family, "float64")
    chat, grid = candidates(model)
    scores = sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS, batch_size=4)
    for index in (6, 12, 19):
        row = scores.rows[index]
        expected = naive_scores(hf, chat.tokenizer, grid.direction(row.position, row.layer).vector, row.layer)
        assert (row.bypass, row.induce, row.kl_nats) == pytest.approx(expected, rel=tolerance(family)), row


def test_baselines_and_per_prompt_scores(tiny_model, plain_model):
    model, hf = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64")
    chat, grid = candidates(model)
    scores = sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS)
    for texts, baseline in ((HARMFUL, scores.baseline_harmful), (HARMLESS, scores.baseline_harmless)):
        by_hand = [score_by_hand(logits(hf, prompt_ids(chat.tokenizer, text))[-1], TOKENS) for text in texts]
        assert baseline == pytest.approx(sum(by_hand) / len(texts), rel=1e-10)
    assert scores.per_prompt.shape == (25, 3, 3) and scores.n_layers == N_LAYERS
    means = scores.per_prompt.nanmean(-1)
    for row, (bypass, induce, kl) in zip(scores.rows, means.tolist(), strict=True):
        assert (row.bypass, row.induce, row.kl_nats) == pytest.approx((bypass, induce, kl), rel=1e-12)
    assert scores.per_prompt[:, 0].isfinite().all() and scores.per_prompt[:, 1:, 2].isnan().all()


def test_candidates_without_a_direction_have_no_score_and_are_still_listed(tiny_model):
    model = tiny_model("llama")
    chat, grid = candidates(model)
    scores = sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS)
    assert len(scores.rows) == 25
    for row in scores.rows:
        assert row.is_finite == (row.layer > 0)
        assert (row.bypass is None) == (row.layer == 0)
    json.dumps([row.describe() for row in scores.rows], allow_nan=False)


def test_a_score_that_is_not_finite_is_no_score(tiny_model, monkeypatch, tmp_path):
    model = tiny_model("gpt2")
    chat, grid = candidates(model)
    monkeypatch.setattr(RefusalPrefixes, "score", lambda _, logits: torch.full((logits.shape[1],), torch.inf))
    scores = sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS)
    assert scores.rows[8].bypass is None and scores.rows[8].kl_nats is not None
    assert scores.baseline_harmful is None and scores.baseline_harmless is None
    write_json(tmp_path / "rows.json", [row.describe() for row in scores.rows])


@pytest.mark.slow
def test_several_token_sets_are_as_many_sweeps(tiny_model):
    model = tiny_model("gpt2")
    chat, grid = candidates(model)
    both = sweep_token_sets(model, chat, grid, HARMFUL, HARMLESS, [TOKENS, (9,)])
    for tokens, found in zip([TOKENS, (9,)], both, strict=True):
        assert found.rows == sweep(model, chat, grid, HARMFUL, HARMLESS, tokens).rows
    assert both[0].rows != both[1].rows
    assert [row.kl_nats for row in both[0].rows] == [row.kl_nats for row in both[1].rows]


@pytest.mark.parametrize(("harmful", "harmless"), [([], ["a"]), (["a"], [])])
def test_a_side_without_prompts_is_refused(harmful, harmless, tiny_model):
    model = tiny_model("gpt2")
    chat, grid = candidates(model)
    with pytest.raises(UserError, match="prompts on both sides"):
        sweep(model, chat, grid, harmful, harmless, TOKENS)


def test_hooks_are_gone_after_the_sweep(tiny_model):
    model = tiny_model("gpt2")
    chat, grid = candidates(model)
    batch = chat.batch(ASKS)
    with torch.no_grad():
        before = model(batch.tokens, attention_mask=batch.mask)
        sweep(model, chat, grid, HARMFUL, HARMLESS, TOKENS)
        assert torch.equal(model(batch.tokens, attention_mask=batch.mask), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


ROW = {"position": -1, "layer": 2, "refusal_score": 1.0, "steering_score": 2.0, "kl_div_score": 0.5}


def test_saved_scores_come_back_and_nan_is_no_score(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(
        json.dumps([ROW, ROW | {"layer": 3, "kl_div_score": float("nan")}, ROW | {"layer": 1, "refusal_score": None}])
    )
    assert "NaN" in path.read_text()
    grid = ScoreGrid.load(path, 4)
    assert grid.rows[0].describe() == ROW
    assert [row.is_finite for row in grid.rows] == [True, False, False]
    assert grid.rows[1].kl_nats is None and grid.positions == (-1,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"position": -1}], "not a score grid"),
        ({"a": 1}, "not a score grid"),
        ([1], "not a score grid"),
        ([], "no candidates"),
        ([ROW | {"layer": 4}], "layer 4, which a model of 4 layers does not have"),
        ([ROW | {"layer": "x"}], "not a score grid"),
        ([ROW | {"refusal_score": "low"}], "not a score grid"),
    ],
)
def test_files_that_are_no_score_grid_are_refused(tmp_path, content, message):
    (tmp_path / "grid.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        ScoreGrid.load(tmp_path / "grid.json", 4)
