"""Both ways of each benchmark give the same result on a tiny model, so that their times can be compared."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import Comparison, Measured, compare, tensor_peak_mib
from benchmarks.generation import plain_generate
from benchmarks.losses import documents, published_loss
from benchmarks.means import plain_means
from benchmarks.responses import one_at_a_time
from benchmarks.staged import distance
from benchmarks.sweep import PublishedSweep, difference, last_positions
from benchmarks.table import table
from refusal_mi.directions import difference_in_means
from refusal_mi.generation import generate
from refusal_mi.measures import MAX_TEXT_TOKENS, answers_to_score, ce_loss, texts_to_score
from refusal_mi.reading import combine_spans, mean_activations
from refusal_mi.search.staged import staged_sweep
from refusal_mi.search.sweep import sweep
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.text.batches import Span
from refusal_mi.text.chat import ChatFormat
from tests.helpers.naive import ASKS, CHATS

pytestmark = pytest.mark.slow

TOKENS = (5, 6)


@pytest.fixture(scope="module")
def pair(tiny_model, plain_model):
    hooked = tiny_model("qwen2")
    return hooked, plain_model("qwen2"), ChatFormat(hooked.tokenizer)


def test_the_published_sweep_gives_the_same_scores_and_the_staged_one_its_winner(pair):
    hooked, plain, chat = pair
    grid = difference_in_means(*(mean_activations(hooked, chat, texts) for texts in (ASKS, CHATS)))
    published = PublishedSweep(plain, chat.tokenizer, chat).run(grid, list(ASKS), list(CHATS), TOKENS)
    ours = sweep(hooked, chat, grid, ASKS, CHATS, TOKENS, prune_layers=0.2)
    assert difference(published, ours) < 1e-4
    other = sweep(hooked, chat, grid, CHATS, ASKS, TOKENS)
    assert difference(published, other) > 1e-2
    rule = Thresholds(kl_max=None, induce_min=None)
    staged = staged_sweep(hooked, chat, grid, ASKS, CHATS, TOKENS, thresholds=rule)
    assert distance(grid, rule, published, staged) < 0.5


def test_extraction_one_at_a_time_gives_the_same_means(pair):
    hooked, plain, chat = pair
    spans = [Span(tuple(ids), first, len(ids)) for ids, first in map(chat.encode_answered, ASKS, CHATS)]
    weights = torch.full((1, len(spans)), 1 / len(spans))
    ours = combine_spans(hooked, spans, weights, pad_id=chat.pad_id)[0, :-1]
    theirs = one_at_a_time(plain, spans)
    assert (ours - theirs).norm() / theirs.norm() < 1e-6 < (ours[1] - ours[0]).norm()


def test_the_published_loss_is_the_same(pair):
    hooked, plain, chat = pair
    for texts in (answers_to_score(chat, list(zip(ASKS, CHATS, strict=True))), texts_to_score(chat, ASKS)):
        ours = ce_loss(hooked, chat, texts).ce_loss
        assert published_loss(plain, texts, chat.pad_id) == pytest.approx(ours, abs=1e-5)
    assert ours != pytest.approx(ce_loss(hooked, chat, texts_to_score(chat, CHATS)).ce_loss, abs=1e-3)


def test_plain_generation_writes_what_ours_does_without_an_intervention(pair):
    hooked, plain, chat = pair
    found = plain_generate(plain, chat, list(ASKS), 3)
    assert found == [answer.token_ids for answer in generate(hooked, chat, ASKS, max_new_tokens=3)]
    assert len(set(found)) > 1


def test_means_prompt_by_prompt_are_the_same(pair):
    hooked, plain, chat = pair
    ours = mean_activations(hooked, chat, ASKS).means
    torch.testing.assert_close(plain_means(plain, chat, list(ASKS)), ours, rtol=1e-5, atol=1e-6)
    assert (ours - mean_activations(hooked, chat, CHATS).means).abs().max() > 1e-3


def test_documents_are_as_long_as_what_is_read(pair):
    _, _, chat = pair
    lengths = [len(chat.tokenizer(text)["input_ids"]) for text in documents(chat)]
    assert len(lengths) > 1 and min(lengths) >= MAX_TEXT_TOKENS


def test_a_comparison_holds_the_ratio_of_the_times_and_refuses_other_results(monkeypatch):
    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr("benchmarks.common.time.perf_counter", lambda: next(ticks))
    row = compare("x", lambda: 1.0, lambda: 1.0, lambda a, b: abs(a - b), must_reach=1.0, n_pairs=3)
    assert isinstance(row, Comparison) and row.ratio == row.ratio_low == row.ratio_high == 1.0
    with pytest.raises(AssertionError, match="the results differ by 1"):
        compare("x", lambda: 1.0, lambda: 2.0, lambda a, b: abs(a - b), must_reach=1.0, n_pairs=1)


def test_peak_memory_is_what_the_work_held():
    # In a process of its own: memory that tests before it held, and give back meanwhile, would hide it.
    # Written to, so that the pages are there, and held long enough to be seen.
    script = """
import torch
from benchmarks.common import measured

def work(size):
    held = torch.ones(size * 2**18)
    return sum(int((held + 1).sum().item() > 0) for _ in range(3))

print(measured(lambda: work(64)).peak_mib, measured(lambda: work(1)).peak_mib)
"""
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    large, small = map(float, ran.stdout.split())
    assert small < 16 and 48 < large < 400


def test_peak_memory_of_tensors_is_exact():
    def work() -> None:
        first = torch.ones(2**18)
        del first
        torch.ones(2**20).mul(2)

    assert tensor_peak_mib(work) == pytest.approx(8, abs=0.01)


def test_work_of_minutes_is_compared_with_one_measurement():
    row = compare("x", Measured(1.0, 6.0, 3.0), lambda: 1.0, lambda a, b: abs(a - b), must_reach=1.0, n_pairs=3)
    assert row.straightforward_seconds == 6.0 and row.straightforward_peak_mib == 3.0
    assert row.ratio == row.ratio_low == row.ratio_high == pytest.approx(6.0 / row.our_seconds)


def test_the_last_positions_are_the_same_candidates(pair):
    hooked, _, chat = pair
    grid = difference_in_means(*(mean_activations(hooked, chat, texts) for texts in (ASKS, CHATS)))
    some = last_positions(grid, 2)
    assert some.positions == (-2, -1) and last_positions(grid, None).positions == grid.positions
    assert torch.equal(some.direction(-2, 3).vector, grid.direction(-2, 3).vector)


def test_the_table_says_what_was_missed():
    row = {
        "name": "a", "ratio": 1.5, "ratio_low": 1.0, "ratio_high": 2.0, "must_reach": 2.0, "note": "n",
        "straightforward_seconds": 3.0, "our_seconds": 2.0, "straightforward_peak_mib": 5.0, "our_peak_mib": 4.0,
        "largest_difference": 0.0,
    }  # fmt: skip
    machine = {"processor": "p", "cores": 2, "gpu": None, "torch": "t", "python": "v"}
    text = table({"machine": machine, "rows": {"a": row, "b": row | {"name": "b", "must_reach": 1.2}}})
    assert text.count("(missed)") == 1 and "| a | 1.50 (1.00–2.00) | 2.00 (missed) |" in text
