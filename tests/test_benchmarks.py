"""Both ways of each benchmark give the same result on a tiny model, so that their times can be compared."""

import pytest
import torch

from benchmarks.common import Comparison, compare, measured
from benchmarks.generation import plain_generate
from benchmarks.losses import published_loss
from benchmarks.responses import one_at_a_time
from benchmarks.staged import distance
from benchmarks.sweep import PublishedSweep, difference
from benchmarks.table import table
from refusal_mi.activations import mean_activations
from refusal_mi.candidates import sweep
from refusal_mi.chat import ChatFormat
from refusal_mi.directions import difference_in_means
from refusal_mi.loss import answers_to_score, ce_loss, texts_to_score
from refusal_mi.selection import Thresholds
from refusal_mi.spans import Span, combine_spans
from refusal_mi.staged import staged_sweep
from tests.naive import ASKS, CHATS

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


def test_plain_generation_counts_its_tokens(pair):
    _, plain, chat = pair
    assert plain_generate(plain, chat, list(ASKS), 3) == 3 * len(ASKS)


def test_a_comparison_holds_the_ratio_of_the_times_and_refuses_other_results(monkeypatch):
    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr("benchmarks.common.time.perf_counter", lambda: next(ticks))
    row = compare("x", lambda: 1.0, lambda: 1.0, lambda a, b: abs(a - b), must_reach=1.0, n_pairs=3)
    assert isinstance(row, Comparison) and row.ratio == row.ratio_low == row.ratio_high == 1.0
    with pytest.raises(AssertionError, match="the results differ by 1"):
        compare("x", lambda: 1.0, lambda: 2.0, lambda a, b: abs(a - b), must_reach=1.0, n_pairs=1)


def test_peak_memory_is_what_the_work_held():
    # Written, so that the pages are there, and held long enough to be seen.
    def work() -> int:
        held = torch.ones(64 * 2**18)
        return sum(int((held + 1).sum().item() > 0) for _ in range(3))

    assert 48 < measured(work).peak_mib < 400


def test_the_table_says_what_was_missed():
    row = {
        "name": "a", "ratio": 1.5, "ratio_low": 1.0, "ratio_high": 2.0, "must_reach": 2.0, "note": "n",
        "straightforward_seconds": 3.0, "our_seconds": 2.0, "straightforward_peak_mib": 5.0, "our_peak_mib": 4.0,
        "largest_difference": 0.0,
    }  # fmt: skip
    machine = {"processor": "p", "cores": 2, "gpu": None, "torch": "t", "python": "v"}
    text = table({"machine": machine, "rows": {"a": row, "b": row | {"name": "b", "must_reach": 1.2}}})
    assert text.count("(missed)") == 1 and "| a | 1.50 (1.00–2.00) | 2.00 (missed) |" in text
