"""The simulation of many workers: what can be worked out by hand comes out, and every assumption costs something."""

import random
from dataclasses import replace

import pytest

from benchmarks.engine_model import SLOW_SHARE, Workers, n_draws, simulate

DRAW = random.Random(0)
ITEMS = [DRAW.uniform(0.5, 1.5) for _ in range(400)]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_items_come_in_rounds(n):
    assert simulate([2.0] * 21, Workers(n)).seconds == pytest.approx(2.0 * -(-21 // n))


def test_one_worker_takes_the_sum_and_many_no_less_than_their_share_or_the_longest_item():
    assert simulate(ITEMS, Workers(1)).seconds == pytest.approx(sum(ITEMS))
    for n in (2, 8, 64, 512):
        least = max(sum(ITEMS) / n, max(ITEMS))
        assert least <= simulate(ITEMS, Workers(n)).seconds <= sum(ITEMS) / n + max(ITEMS)


def test_starting_is_waited_for_once_and_grows_with_the_workers_where_weights_are_read_from_one_place():
    warm, cold = (simulate(ITEMS, Workers(8, start)).seconds for start in (0.0, 5.0))
    assert cold == pytest.approx(warm + 5.0)
    heavy = Workers(8, 5.0, weights_mib=2000.0, shared_mib=1000.0, a_machine=2)
    assert simulate(ITEMS, heavy).seconds == pytest.approx(warm + 8.0)
    assert heavy.reading(1) == 5.0


def test_no_number_of_workers_is_faster_than_items_are_handed_out():
    for n in (64, 512):
        assert simulate(ITEMS, Workers(n, overhead_seconds=0.1)).seconds >= 0.1 * len(ITEMS)


def test_stragglers_cost_time():
    all_slow = Workers(4, slow_share=1.0, slow_factor=3.0)
    assert simulate(ITEMS, all_slow).seconds == pytest.approx(3 * simulate(ITEMS, Workers(4)).seconds)
    some = simulate(ITEMS, replace(all_slow, slow_share=0.3, seed=1)).seconds
    assert simulate(ITEMS, Workers(4)).seconds < some < 3 * simulate(ITEMS, Workers(4)).seconds


@pytest.mark.parametrize("n", [1, 2])
def test_the_mean_time_with_stragglers_is_what_their_share_says(n):
    one = Workers(n, slow_share=SLOW_SHARE)
    times = [simulate([1.0] * n, replace(one, seed=seed)).seconds for seed in range(n_draws(n))]
    some_slow = 1 - (1 - SLOW_SHARE) ** n
    error = 2 * (some_slow * (1 - some_slow) / len(times)) ** 0.5
    assert sum(times) / len(times) == pytest.approx(1 + 2 * some_slow, abs=4 * error)
    assert 4 * error < some_slow, "too few draws would not tell"


def test_lost_workers_cost_time_and_items_are_given_up_after_two_tries():
    never, often = Workers(4, 2.0), Workers(4, 2.0, hours_to_failure=20 / 3600)
    outcome = simulate(ITEMS, often)
    assert outcome == simulate(ITEMS, often) and outcome.n_lost > 10
    assert outcome.seconds > simulate(ITEMS, never).seconds
    assert simulate(ITEMS, replace(often, hours_to_failure=1e9)) == simulate(ITEMS, never)
    hopeless = simulate([50.0] * 6, Workers(2, 1.0, hours_to_failure=1 / 3600))
    assert hopeless.n_given_up == 6 and hopeless.n_lost == 12
