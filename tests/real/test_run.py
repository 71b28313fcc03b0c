"""One run of a model that refuses about half of what is harmful: what its files say, worked out a second way."""

import math

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.interventions import Ablate
from refusal_mi.judges.substring import MAX_DEGENERATE, is_refusal
from refusal_mi.measures import next_token_logits
from refusal_mi.run.answers import SIDES
from refusal_mi.run.folder import RunInputs, RunRecord
from tests.helpers.naive import ablating, logits, relative_error
from tests.helpers.real import QWEN

pytestmark = pytest.mark.real
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.fixture(scope="module")
def record(qwen_run):
    assert qwen_run.status == 0
    return RunRecord.load(qwen_run.folder)


@pytest.fixture(scope="module")
def inputs(record, qwen):
    return RunInputs(qwen, record.path)


def ids_of(tokenizer, instruction):
    """The prompt, written by hand."""
    turns = {"system": SYSTEM, "user": instruction}
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns.items())
    return tokenizer(f"{text}<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


def test_the_tokens_that_begin_refusals_are_found(record):
    found, published = (
        {token.text for token in tokens}
        for tokens in (record.prompts.refusal_tokens, record.prompts.published_refusal_tokens)
    )
    assert {"I"} <= found <= published == {"I", "As"}


def test_what_is_kept_is_refused_or_answered_by_its_own_text(record):
    for side in SIDES:
        rows = [*record.prompts.side(side).train, *record.prompts.side(side).val]
        assert [row.is_refused for row in rows] == [is_refusal(row.answer) for row in rows]
        assert [row.kept for row in rows] == [row.is_refused == (side == "harmful") for row in rows]
        assert {row.kept for row in rows} == {True, False}


def test_labels_are_those_of_plain_greedy_decoding(record, qwen, plain_qwen):
    rows = [*record.prompts.harmful.train[:8], *record.prompts.harmless.train[:4]]
    for row in rows:
        ids = torch.tensor([ids_of(qwen.tokenizer, row.instruction)])
        new = plain_qwen.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        answer = qwen.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (row.answer, row.is_refused) == (answer, is_refusal(answer))
    assert {row.is_refused for row in rows} == {True, False}


def test_the_zero_point_tells_refusals_apart_and_the_published_zero_loses_most(record):
    rows, zero = [*record.prompts.harmful.train, *record.prompts.harmless.train], record.prompts.zero_point_nats
    assert -2.5 < zero < -0.2

    def above(point, refused):
        hits = [row.refusal_score > point for row in rows if row.is_refused == refused]
        return sum(hits) / len(hits)

    assert (above(zero, True) + 1 - above(zero, False)) / 2 > 0.85
    assert above(0, True) < 0.5


def p_mcnemar(before, after):
    """Exact and two-sided: of the prompts that changed, as many changed one way as the other."""
    new = [b for a, b in zip(before, after, strict=True) if a != b]
    rare = min(sum(new), len(new) - sum(new))
    return min(1.0, 2 * sum(math.comb(len(new), k) for k in range(rare + 1)) / 2 ** len(new))


@pytest.mark.parametrize(("side", "label", "sign"), [("harmful", "ablation", -1), ("harmless", "actadd", 1)])
def test_the_direction_changes_refusals_and_a_random_one_does_not(side, label, sign, record):
    effects = record.side(side)
    plain, changed, random = (effects.find(each) for each in ("baseline", label, f"random_{label}_0"))
    flags = [[answer.is_refused for answer in record.answers(effects, each)] for each in ("baseline", label)]
    low, high = random.refusal.interval
    assert low <= plain.refusal.value <= high
    assert sign * (changed.refusal.value - plain.refusal.value) > 0 and p_mcnemar(*flags) < 0.05
    assert changed.degenerate.value <= MAX_DEGENERATE


def test_the_chosen_direction_costs_little_and_others_cost_more(record):
    screened = record.scores.per_prompt[:, 2].nanmean(-1)
    assert record.selection.best.kl_nats <= 0.1 < screened[screened.isfinite()].max()


def test_logits_are_those_of_plain_transformers_also_under_ablation(inputs, qwen, plain_qwen):
    texts = inputs.prompts("harmful")[:2] + inputs.prompts("harmless")[:2]
    rows = [ids_of(qwen.tokenizer, text) for text in texts]
    plain = torch.stack([logits(plain_qwen, ids)[-1] for ids in rows])
    with ablating(plain_qwen, inputs.direction.vector):
        ablated = torch.stack([logits(plain_qwen, ids)[-1] for ids in rows])
    assert relative_error(next_token_logits(qwen, inputs.chat, texts), plain) < 1e-4
    hooked = next_token_logits(qwen, inputs.chat, texts, interventions=[Ablate(inputs.direction)])
    assert relative_error(hooked, ablated) < 1e-4 < 1e-2 < relative_error(hooked, plain)


def test_model_info_of_a_real_model_fits_a_screen(real_dir, record, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert exit_status(["model-info", str(real_dir(QWEN)), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 30 and "refused by text" in shown
    assert all(f"{token.id} {token.text!r}" in shown for token in record.prompts.refusal_tokens)
