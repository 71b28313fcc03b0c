"""The staged search finds what the exact one finds, measures less, and says what it left out."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.staged_draws import KnownScores
from refusal_mi.directions import DirectionGrid, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.reading import mean_activations
from refusal_mi.search.grid import select
from refusal_mi.search.passes import PlainPasses, SharedPasses
from refusal_mi.search.staged import Rounds, Screening, spread, staged_sweep, usual_cost
from refusal_mi.search.sweep import ITEM_ROWS, Scorer, ScoreTable, WorkItem, cut, exact_items, sweep
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import grid_of
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.tiers import first_is_fast

TOKENS = (5, 6, 7)
HARMFUL = [f"{text} {number}" for number in range(2) for text in ASKS[1:]]
HARMLESS = [f"{text} {number}" for number in range(2) for text in CHATS[1:]]


@pytest.fixture(scope="module")
def parts(tiny_model):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    return model, chat, grid_of(model, chat, ASKS, CHATS)


@pytest.fixture(scope="module")
def exact(parts):
    return sweep(*parts, HARMFUL, HARMLESS, TOKENS, share_work=False)


def rule_that_binds(exact) -> Thresholds:
    """Thresholds that reject the candidates ahead of the fourth in bypass order, so that the search must walk on."""
    limit = Thresholds(kl_max=None, induce_min=None)
    fourth = select(exact, limit).survivors[3]
    return Thresholds(kl_max=None, induce_min=fourth.induce)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_with_every_prompt_in_the_first_round_the_winner_is_the_exact_one(parts, exact, seed):
    rule = rule_that_binds(exact)
    found = staged_sweep(
        *parts, HARMFUL, HARMLESS, TOKENS, thresholds=rule, screening=Screening(n_prompts=8, seed=seed)
    )
    best, expected = select(found, rule).best, select(exact, rule).best
    assert (best.position, best.layer) == (expected.position, expected.layer)
    assert (best.bypass, best.induce, best.kl_nats) == pytest.approx(
        (expected.bypass, expected.induce, expected.kl_nats), abs=1e-4
    )


def test_what_is_measured_is_exact_and_what_is_not_says_why(parts, exact):
    rule = Thresholds(kl_max=None, induce_min=None)
    found = staged_sweep(
        *parts, HARMFUL, HARMLESS, TOKENS, thresholds=rule, screening=Screening(n_prompts=2, n_contenders=4)
    )
    assert [(row.position, row.layer) for row in found.rows] == [(row.position, row.layer) for row in exact.rows]
    measured = [row for row in found.rows if row.is_finite]
    assert 1 <= len(measured) < len(found.rows) / 2
    for index, (row, expected) in enumerate(zip(found.rows, exact.rows, strict=True)):
        if row.is_finite:
            assert row.skipped is None and row.bypass == pytest.approx(expected.bypass, abs=1e-4)
            continue
        assert (row.bypass, row.induce, row.kl_nats) == (None, None, None) and row.skipped
        values, of_all = found.per_prompt[index], exact.per_prompt[index]
        if row.layer >= 4:
            assert row.skipped.startswith("not run: layers from 4 on") and values.isnan().all()
            continue
        assert row.skipped.startswith("screened out for bypass: bypass")
        known = values.isfinite()
        assert known[0].sum() >= 2 and not known.all()
        assert torch.allclose(values[known], of_all[known], atol=1e-4)
    json.dumps([row.describe() for row in found.rows], allow_nan=False)
    n_out, n_late = (sum((row.skipped or "").startswith(why) for row in found.rows) for why in ("screened", "not run"))
    words = f"{n_out + n_late} left out by the search ({n_late} not run, {n_out} screened out for bypass)"
    assert words in select(found, rule).explain()


def search(grid, bypass, screening):
    known = torch.ones(len(bypass), 3, bypass.shape[1], dtype=torch.float64)
    known[:, 0] = bypass
    table = ScoreTable(KnownScores(grid, known))
    rule = Thresholds(kl_max=None, induce_min=None, prune_layers=None)
    Rounds(table, rule, screening).run()
    return select(table.grids()[0], rule).best, table


def test_a_near_tie_is_settled_on_all_prompts(parts):
    """Four candidates that differ by less than what prompts differ by: whoever leads early need not win."""
    grid, n_found = parts[2], 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        bypass = torch.full((len(grid.candidates()), 32), 5.0).double()
        near = torch.randn(4, 32, generator=draw).double()
        bypass[10:14] = near
        best, _ = search(grid, bypass, Screening(n_prompts=2, n_contenders=4, seed=seed))
        n_found += (best.position, best.layer) == grid.candidates()[10 + int(near.mean(1).argmin())]
    assert n_found >= 19


def test_candidates_that_are_clearly_worse_are_not_screened_further(parts):
    grid = parts[2]
    levels = torch.arange(len(grid.candidates()))[:, None].double()
    noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).double()
    own = 1e-3 * torch.randn(len(levels), 32, generator=torch.Generator().manual_seed(1)).double()
    best, table = search(grid, levels + noise + own, Screening(n_prompts=4, n_contenders=8))
    assert (best.position, best.layer) == table.places[0]
    assert [len(table.known(place, 1)) for place in table.places[:9]] == [32, 4, 4, 4, 4, 4, 4, 4, 0]
    assert all(len(table.known(place, 0)) == 4 and not len(table.known(place, 1)) for place in table.places[8:])


def test_when_nothing_can_pass_the_search_ends_without_a_winner_and_says_for_what(parts):
    rule = Thresholds(kl_max=0.0, induce_min=30.0)
    found = staged_sweep(*parts, HARMFUL, HARMLESS, TOKENS, thresholds=rule, screening=Screening(n_prompts=2))
    chosen = select(found, rule)
    assert not chosen.survivors
    assert all(
        row.skipped.startswith(("screened out for KL", "screened out for induce", "not run")) for row in found.rows
    )
    assert " screened out for KL" in chosen.explain() or " screened out for induce" in chosen.explain()


WIDE = DirectionGrid(
    torch.randn(5, 20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    tuple(range(-5, 0)),
    ((False,) * 20,) * 5,
    {},
)
N = 64


class Recorded(KnownScores):
    """Known scores, and every item that was asked for."""

    def __init__(self, grid, known, baseline=None):
        super().__init__(grid, known, baseline)
        self.items = []

    def run(self, item):
        self.items.append(item)
        return super().run(item)

    def prompt_runs(self):
        """Blocks that ran, over those of the model."""
        n_layers = self.grid.n_layers
        blocks = [
            n_layers - (layer if i.kind == "add" else 0)
            for i in self.items
            for _, layer in i.candidates
            for _ in i.prompts
        ]
        return sum(blocks) / n_layers


def search_known(induce, *, kl=0.01, kl_noise=0.001, seed=0, n_best=1):
    """A search by the published rule: bypass rises along the grid; induce is given, one mean for each candidate."""
    noise = torch.randn(3, 100, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = torch.stack(
        [torch.arange(100.0) / 4, torch.as_tensor(induce).expand(100), torch.as_tensor(kl).expand(100)]
    ).double()
    scale = torch.stack([torch.full((100,), 0.3), torch.ones(100), torch.as_tensor(kl_noise).expand(100)])[..., None]
    scorer = Recorded(WIDE, (means[:, :, None] + scale * noise).transpose(0, 1))
    rounds = Rounds(ScoreTable(scorer), Thresholds(), Screening(seed=seed), n_best=n_best)
    rounds.run()
    return rounds, scorer, rounds.table.grids()[0]


def test_the_usual_cost_is_that_of_a_search_that_finds_its_winner_at_once():
    costs = []
    for seed in range(8):
        rounds, scorer, found = search_known(3.0, seed=seed)
        assert [row.layer for row in select(found).survivors] == [0]
        assert rounds.spent == pytest.approx(scorer.prompt_runs(), abs=1e-6)
        costs.append(rounds.spent / rounds.usual)
    assert 0.8 < sum(costs) / 8 < 1.1
    assert rounds.usual == usual_cost([place for place in WIDE.candidates() if place[1] < 16], 20, N, N, Screening())


@pytest.mark.parametrize("n_best", [2, 3, 5])
def test_as_many_survivors_are_found_as_are_asked_for_the_best_ones_first(n_best):
    rounds, _, found = search_known(3.0, n_best=n_best)
    assert [row.layer for row in select(found).survivors] == list(range(n_best))
    assert rounds.spent <= 1.5 * rounds.usual and rounds.usual > search_known(3.0)[0].usual


def test_the_zero_point_is_what_induce_counts_from():
    chosen = {zero: search_known_at(zero, induce=-1.0) for zero in (-2.0, 0.0)}
    assert [row.layer for row in chosen[-2.0].survivors] == [0] and not chosen[0.0].survivors


@pytest.mark.parametrize("n_far", [10, 26, 40])
def test_a_few_prompts_far_below_do_not_screen_out_what_half_of_the_prompts_reach(n_far):
    """The mean of induce is far below the zero point, its median above it: as the exact search has it."""
    _, scorer, _ = search_known(3.0)
    scorer.known[:, 1, torch.randperm(N, generator=torch.Generator().manual_seed(0))[:n_far]] = -15.0
    whole = ScoreTable(KnownScores(WIDE, scorer.known))
    for item in exact_items(whole.open, N, 2 * N):
        whole.run(item)
    rounds = Rounds(ScoreTable(KnownScores(WIDE, scorer.known)), Thresholds(), Screening(), 0.0)
    rounds.run()
    exact, staged = (select(replace(table.grids()[0], zero_point=0.0)) for table in (whole, rounds.table))
    assert bool(exact.survivors) == bool(staged.survivors) == (n_far < 30)
    if staged.survivors:
        assert (staged.best.position, staged.best.layer) == (exact.best.position, exact.best.layer)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 31])
def test_any_beginning_of_the_order_takes_from_all_ranks(n):
    for seed in range(20):
        order = spread(range(n), random.Random(seed))
        assert sorted(order) == list(range(n))
        parts = 1
        while parts <= n // 2:
            cuts = [n * part / parts for part in range(parts + 1)]
            counts = [sum(low - 1 < rank < high for rank in order[:parts]) for low, high in pairwise(cuts)]
            assert min(counts) >= 1
            parts *= 2
    assert n < 5 or len({tuple(spread(range(n), random.Random(seed))) for seed in range(20)}) > 10


def test_scores_that_are_not_finite_are_out():
    _, scorer, _ = search_known(3.0)
    scorer.known[0, 1, :] = torch.nan
    rounds = Rounds(ScoreTable(KnownScores(WIDE, scorer.known)), Thresholds(), Screening())
    rounds.run()
    found = rounds.table.grids()[0]
    assert (select(found).best.position, select(found).best.layer) == WIDE.candidates()[1]
    assert found.rows[0].skipped.startswith("screened out for scores that are not finite")


def search_known_at(zero_point, induce):
    """The choice where induce counts from a zero point."""
    _, scorer, _ = search_known(induce)
    rounds = Rounds(ScoreTable(scorer), Thresholds(), Screening(), zero_point)
    rounds.run()
    return select(replace(rounds.table.grids()[0], zero_point=zero_point))


def test_progress_counts_prompt_runs_towards_the_usual_cost(monkeypatch):
    shown = []

    def track(items, description, *, total, work):
        for item in items:
            shown.append((total, work(item)))
            yield item

    monkeypatch.setattr("refusal_mi.search.staged.track", track)
    rounds, scorer, _ = search_known(3.0)
    assert sum(n for _, n in shown) == int(scorer.prompt_runs()) > rounds.usual
    assert {total for total, _ in shown} == {round(rounds.usual)}
    assert max(len(item.candidates) * len(item.prompts) for item in scorer.items) <= 128


def test_where_every_candidate_clearly_fails_each_says_for_what_within_twice_the_usual_cost():
    rounds, scorer, found = search_known(-9.0)
    assert scorer.prompt_runs() <= 2 * rounds.usual
    rows = [row for row in found.rows if row.layer < 16]
    assert len(rows) == 80 and all(row.skipped.startswith("screened out for induce: bypass") for row in rows)
    assert "(20 not run, 80 screened out for induce)" in select(found).explain()


@pytest.mark.parametrize(("induce", "kl"), [(-0.4, 0.01), (3.0, 0.1002)])
def test_where_many_fail_by_little_the_search_stops_and_says_so(induce, kl, monkeypatch):
    rounds, scorer, found = search_known(induce, kl=kl)
    assert rounds.has_stopped and len(rounds.failed) >= 4 and not select(found).survivors
    first_contenders = 8 * 2 * N  # on all harmless prompts, added and ablated: judged in any case
    assert scorer.prompt_runs() <= max(2 * rounds.usual, rounds.usual + first_contenders)
    left = [row for row in found.rows if (row.skipped or "").startswith("not settled when the search stopped after")]
    assert len(left) > 40 and f"{len(left)} not settled when the search stopped" in select(found).explain()
    again = search_known(induce, kl=kl)
    assert again[1].items == scorer.items and again[2].rows == found.rows
    monkeypatch.setattr("refusal_mi.search.staged.MOST", 1000)
    unbounded, scorer, _ = search_known(induce, kl=kl)
    assert not unbounded.has_stopped and scorer.prompt_runs() > 3 * rounds.usual


def test_a_candidate_far_down_the_ranking_is_found_within_the_limit():
    induce = torch.full((100,), -9.0)
    induce[70] = 3.0
    rounds, scorer, found = search_known(induce)
    assert [(row.position, row.layer) for row in select(found).survivors] == [WIDE.candidates()[70]]
    assert scorer.prompt_runs() <= 2 * rounds.usual
    assert not [row for row in found.rows if (row.skipped or "").startswith("not settled")]


@pytest.mark.parametrize("seed", range(5))
def test_the_one_that_passes_is_found_behind_many_that_fail_by_little(seed):
    """Twenty that bypass better and whose KL is above the limit on average, but scattered: none is out at first."""
    kl, noise = torch.full((100,), 0.25), torch.full((100,), 0.3)
    kl[20], noise[20] = 0.05, 0.02
    kl[21:] = 0.3
    rounds, scorer, found = search_known(3.0, kl=kl, kl_noise=noise, seed=seed)
    assert [(row.position, row.layer) for row in select(found).survivors] == [WIDE.candidates()[20]]
    assert scorer.prompt_runs() <= 2 * rounds.usual
    at_first = [place for place in WIDE.candidates()[:16] if len(rounds.table.known(place, 2)) > 4]
    assert len(at_first) > 3, "they were not clearly out on four prompts"


@pytest.mark.parametrize("start", [0, 60])
@pytest.mark.parametrize("seed", range(8))
def test_the_first_contenders_are_all_judged_whatever_they_cost(seed, start):
    """Seven that miss induce by little, before one that reaches it by little: the choice is the exact one."""
    induce = torch.full((100,), -9.0)
    induce[start : start + 7], induce[start + 7] = -0.4, 0.5
    _, scorer, found = search_known(induce, seed=seed)
    whole = ScoreTable(KnownScores(WIDE, scorer.known))
    for item in exact_items(whole.open, N, 2 * N):
        whole.run(item)
    expected = select(whole.grids()[0]).best
    assert (select(found).best.position, select(found).best.layer) == (expected.position, expected.layer)


def test_a_screening_that_measures_nothing_is_refused():
    with pytest.raises(UserError, match="at least one prompt"):
        Screening(n_prompts=0)


@pytest.mark.slow
def test_items_cover_the_work_once_go_through_json_and_may_run_elsewhere_in_any_order(parts, tiny_model, exact):
    model, chat, grid = parts
    here = ScoreTable(Scorer(model, chat, grid, HARMFUL, HARMLESS, [TOKENS]))
    items = exact_items(here.open, 8, 16)
    cells = [(item.kind, place, prompt) for item in items for place in item.candidates for prompt in item.prompts]
    assert len(cells) == len(set(cells)) == len(here.open) * (16 + 8)
    sent = [WorkItem.from_record(json.loads(json.dumps(item.describe()))) for item in items]
    assert sent == items
    elsewhere = Scorer(model, chat, grid, HARMFUL, HARMLESS, [TOKENS], batch_size=3)
    for item in reversed(sent):
        here.add(item, elsewhere.run(item))
    (found,) = here.grids()
    assert torch.allclose(found.per_prompt, exact.per_prompt, atol=1e-4, equal_nan=True)
    assert found.per_prompt[10:, 0].std() > 1e-2


def test_items_hold_few_rows_and_additions_one_layer():
    places = [(position, layer) for position in (-2, -1) for layer in range(4)]
    for kind in ("ablate", "add"):
        items = list(cut(kind, places, range(200)))
        assert {place for item in items for place in item.candidates} == set(places)
        assert all(len(item.candidates) * 200 <= ITEM_ROWS for item in items)
    assert all(len({layer for _, layer in item.candidates}) == 1 for item in items)


def test_skipped_layers_have_no_scores_and_the_others_the_same(parts, exact):
    found = sweep(*parts, HARMFUL, HARMLESS, TOKENS, prune_layers=0.4)
    for row, expected in zip(found.rows, exact.rows, strict=True):
        if row.layer >= 3:
            assert row.skipped == "not run: layers from 3 on are pruned" and row.bypass is None
        else:
            assert row.bypass == pytest.approx(expected.bypass, abs=1e-4)
    assert (
        select(found).survivors
        == select(sweep(*parts, HARMFUL, HARMLESS, TOKENS), Thresholds(prune_layers=0.4)).survivors
    )


@pytest.mark.parametrize("family", first_is_fast(["gpt2", "llama", "mixtral", "gpt_neox"]))
def test_shared_passes_equal_plain_ones_for_any_choice_of_prompts_and_batches(family, tiny_model):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer, "Be kind. " * 4)
    grid = difference_in_means(*(mean_activations(model, chat, texts) for texts in (ASKS, CHATS)))
    rows = [chat.encode(text) for text in (*ASKS, *CHATS)]
    plain = PlainPasses(model, rows, chat.pad_id)
    directions = [grid.direction(position, 2) for position in (-4, -2, -1)]
    for batch_size, overhead, prompts in (
        (None, 0.0, [7, 0, 3, 9]),
        (2, 0.0, [1, 2, 5]),
        (None, 1e9, [4, 8]),
        (5, 30.0, [6]),
    ):
        shared = SharedPasses(model, rows, chat.pad_id, batch_size)
        shared.overhead = overhead
        for run in ("ablated", "added"):
            found, expected = (getattr(passes, run)(directions, prompts) for passes in (shared, plain))
            assert (found - expected).abs().max() < 2e-5, (run, prompts)
            assert (expected - plain.plain(prompts)).abs().max() > 1e-2
        assert (shared.plain(prompts) - plain.plain(prompts)).abs().max() < 2e-5


def test_passes_shrink_when_memory_runs_out_and_give_the_same_numbers(parts, monkeypatch):
    model, chat, grid = parts
    rows = [chat.encode(text) for text in ASKS]
    expected = PlainPasses(model, rows, chat.pad_id).ablated([grid.direction(-1, 2)], range(5))
    from refusal_mi.search import passes

    real, sizes = passes.prefix_logits_and_cache, []

    def small_memory(model, tokens, *rest):
        sizes.append(tokens.numel())
        if tokens.numel() > 150:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, tokens, *rest)

    monkeypatch.setattr(passes, "prefix_logits_and_cache", small_memory)
    shared = SharedPasses(model, rows, chat.pad_id)
    assert (shared.ablated([grid.direction(-1, 2)], range(5)) - expected).abs().max() < 2e-5
    assert max(sizes) > 150 and shared.pass_tokens < 3072
    with pytest.raises(UserError, match="out of memory in a pass of batch size 5"):
        SharedPasses(model, rows, chat.pad_id, 5).ablated([grid.direction(-1, 2)], range(5))


def test_the_model_is_as_before_after_a_shared_pass(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    batch = chat.batch(ASKS[:2])
    with torch.no_grad():
        before = model(batch.tokens, attention_mask=batch.mask)
        SharedPasses(model, [chat.encode(text) for text in ASKS], chat.pad_id).plain(range(5))
        assert torch.equal(model(batch.tokens, attention_mask=batch.mask), before)
