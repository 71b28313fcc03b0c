"""Rates and their Wilson intervals."""

import math

import pytest

from refusal_mi.stats import Rate


# The ends solve (p − k/n)² = z² p (1 − p) / n, here by bisection.
def _wilson_end(count: int, n: int, low: float, high: float) -> float:
    def excess(p: float) -> float:
        return (p - count / n) ** 2 - 1.959963984540054**2 * p * (1 - p) / n

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(low) * excess(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(("count", "n"), [(1, 10), (5, 10), (97, 100), (3, 7)])
def test_the_interval_solves_the_score_equation(count, n):
    low, high = Rate(count, n).interval
    assert low == pytest.approx(_wilson_end(count, n, 1e-12, count / n), abs=1e-9)
    assert high == pytest.approx(_wilson_end(count, n, count / n, 1 - 1e-12), abs=1e-9)


def test_the_interval_is_not_a_point_at_zero_and_one():
    low, high = Rate(0, 10).interval
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert Rate(10, 10).interval[0] == pytest.approx(1 - high)


def test_rate_of_flags_and_its_json():
    rate = Rate.of([True, False, True, True])
    assert rate == Rate(3, 4) and rate.value == 0.75
    described = rate.describe()
    assert set(described) == {"rate", "low", "high", "count", "n"}
    assert all(math.isfinite(value) for value in described.values())
    assert str(rate) == f"0.75 [{described['low']:.2f}, {described['high']:.2f}]"


@pytest.mark.parametrize(("count", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_rates_are_refused(count, n):
    with pytest.raises(ValueError, match="count"):
        Rate(count, n)
