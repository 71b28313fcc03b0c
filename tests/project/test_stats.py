"""Rates and paired differences: their intervals cover, and their tests are those of SciPy and statsmodels."""

import math

import numpy as np
import pytest
from scipy.stats import binom, bootstrap, mannwhitneyu, multinomial, norm, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from refusal_mi.stats import AUC, Paired, Rate, bootstrap_interval, holm, mean_interval, p_text


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


def paired(both: int, only_before: int, only_after: int, neither: int) -> Paired:
    before = [True] * (both + only_before) + [False] * (only_after + neither)
    after = [True] * both + [False] * only_before + [True] * only_after + [False] * neither
    return Paired.of(before, after)


@pytest.mark.parametrize("cells", [(8, 10, 0, 14), (3, 5, 2, 9), (0, 0, 1, 6), (4, 0, 0, 4), (0, 60, 41, 2)])
def test_the_paired_test_is_that_of_statsmodels(cells):
    both, less, more, neither = cells
    expected = mcnemar([[both, less], [more, neither]], exact=True).pvalue
    found = paired(*cells)
    assert found.p_value == pytest.approx(expected, abs=1e-12)
    assert found.difference == pytest.approx((more - less) / sum(cells))


def test_what_two_wilson_intervals_hide_is_an_effect_on_the_same_prompts():
    """18 of 32 refused before, 8 after, none newly: the intervals overlap, p is 0.002. Unrelated changes are not."""
    found = paired(8, 10, 0, 14)
    assert Rate(18, 32).interval[0] < Rate(8, 32).interval[1]
    assert found.p_value == pytest.approx(2 / 2**10) and found.interval[1] < 0
    assert str(found) == "−0.31 [−0.46, −0.13], p = 0.002"
    assert paired(4, 14, 4, 10).p_value == pytest.approx(0.0309, abs=1e-4)
    assert paired(2, 16, 6, 8).p_value > 0.05, "the control: the same rates, prompts that changed both ways"


def test_pairs_must_be_of_the_same_prompts():
    with pytest.raises(ValueError):
        Paired.of([True], [True, False])
    with pytest.raises(ValueError, match="at least one"):
        Paired.of([], [])


def test_the_paired_interval_is_newcombes():
    """The first worked example of his paper (1998), and the limits without correlation from statsmodels' Wilson's."""
    assert paired(36, 2, 12, 0).interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    (low_b, high_b), (low_a, high_a) = (proportion_confint(k, 20, method="wilson") for k in (5, 15))
    independent = 0.5 - math.hypot(0.75 - low_a, high_b - 0.25), 0.5 + math.hypot(high_a - 0.75, 0.25 - low_b)
    assert paired(4, 1, 11, 4).interval == pytest.approx(independent), "so weak a correlation counts as none"
    assert paired(5, 0, 10, 5).interval[0] > independent[0], "the control: correlated answers say more"


@pytest.mark.parametrize("n", [8, 16, 32, 100])
def test_the_paired_interval_covers_on_average_and_never_badly(n):
    """Over rates before and after of all sizes, independent or correlated; exact, or 1,500 draws each for 100."""
    cells = [
        (p * q + shift, p * (1 - q) - shift, (1 - p) * q - shift, (1 - p) * (1 - q) + shift)
        for p in (0.05, 0.2, 0.5, 0.8, 0.95)
        for q in (0.05, 0.2, 0.5, 0.8, 0.95)
        for shift in {0.0, 0.6 * (min(p, q) - p * q)}
    ]
    drawn = np.random.default_rng(0)
    whole = [(a, b, c, n - a - b - c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)]
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    coverage = []
    for p in cells:
        counts = whole if n < 100 else [tuple(row) for row in drawn.multinomial(n, p, 1500).tolist()]
        known |= {row: paired(*row).interval for row in set(counts) - set(known)}
        low, high = np.array([known[row] for row in counts]).T
        inside = (low <= p[2] - p[1]) & (p[2] - p[1] <= high)
        coverage.append(inside.mean() if n == 100 else multinomial.pmf(np.array(counts), n, p)[inside].sum())
    assert 0.95 <= np.mean(coverage) <= 0.97 and min(coverage) >= (0.9 if n > 8 else 0.88)


def test_the_paired_interval_near_0_and_1_covers_what_it_says():
    """Always refused before, refused with probability e after: Wilson's own weakness, at worst 84%."""
    for n in (8, 20, 100):
        rates = np.linspace(0.0005, 0.05, 500)
        covered = np.zeros_like(rates)
        for kept in range(n + 1):
            low, high = paired(kept, n - kept, 0, 0).interval
            inside = (low <= rates - 1) & (rates - 1 <= high)
            covered += np.where(inside, binom.pmf(kept, n, rates), 0)
        assert 0.83 < covered.min() < 0.86, "rates of 0.05 to 0.95 do not show it"


@pytest.mark.parametrize("n", [8, 16, 40, 100])
def test_the_interval_of_a_mean_covers_it_nineteen_times_in_twenty(n):
    draws = np.random.default_rng(n).normal(3, 1, (4000, n)).tolist()
    covered = np.mean([low <= 3 <= high for _, low, high in map(mean_interval, draws)])
    assert 0.94 <= covered <= 0.96
    shorter = [(mean - 3) / (high - mean) * t.ppf(0.975, n - 1) for mean, _, high in map(mean_interval, draws)]
    if n == 8:
        assert np.mean(np.abs(shorter) <= 1.96) < 0.93, "the control: ± 1.96 standard errors do not"
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_the_interval_of_a_mean_is_scipys():
    values = [1.0, 2.0, 4.0, 9.0]
    expected = t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2)
    assert mean_interval(values)[1:] == pytest.approx(expected)


@pytest.mark.parametrize("n", [8, 16, 32, 100])
def test_the_rate_interval_covers_on_average(n):
    low, high = np.array([Rate(count, n).interval for count in range(n + 1)]).T
    rates = np.linspace(0.02, 0.98, 97)
    coverage = [binom.pmf(range(n + 1), n, p)[(low <= p) & (p <= high)].sum() for p in rates]
    assert 0.94 <= np.mean(coverage) <= 0.96


def test_holm_is_that_of_statsmodels():
    p = [0.04, 0.001, 0.03, 0.2, 0.011, 0.9]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([]) == []


def _ratio(a, b):
    return a.mean(-1) / b.mean(-1)


def test_the_bootstrap_is_scipys_and_seeded():
    skewed = np.random.default_rng(3).exponential(1.0, 24)
    value, low, high = bootstrap_interval(skewed.tolist(), seed=5)
    own = bootstrap((skewed,), np.mean, method="BCa", n_resamples=1999, rng=np.random.default_rng(5))
    assert (low, high) == pytest.approx(tuple(own.confidence_interval), rel=1e-9)
    assert low < value < high and bootstrap_interval(skewed.tolist(), seed=5) == (value, low, high)
    assert high - value > value - low, "skewed to the right, as the numbers are"
    _, low, high = bootstrap_interval([1.0, 2.0, 3.0, 1.0], [5.0, -5.0, 0.5, 0.5], statistic=_ratio)
    assert math.isnan(low) and math.isnan(high), "a divisor that can be 0 leaves no limits, and no certainty"
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0) == bootstrap_interval([2.0])


def test_a_ratio_of_the_same_prompts_is_resampled_together():
    prompts = np.random.default_rng(1).exponential(1.0, 40)
    _, low, high = bootstrap_interval((0.5 * prompts).tolist(), prompts.tolist(), statistic=_ratio)
    assert (low, high) == pytest.approx((0.5, 0.5)), "on every draw of prompts the ratio is one half"
    with pytest.raises(ValueError, match="as many"):
        bootstrap_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("p", "said"), [(0.0004, "< 0.001"), (0.0312, "= 0.031"), (0.5, "= 0.50")])
def test_p_values_read_as_in_papers(p, said):
    assert p_text(p) == said


@pytest.mark.parametrize(("n_positive", "n_negative"), [(7, 5), (32, 32), (8, 60)])
def test_an_auc_is_mann_whitneys_and_its_interval_solves_the_score_equation(n_positive, n_negative):
    rng = np.random.default_rng(0)
    positive, negative = (rng.integers(2, 9, n_positive) / 2).tolist(), (rng.integers(0, 7, n_negative) / 2).tolist()
    found, pairs = AUC.of(positive, negative), n_positive * n_negative
    assert found.value == pytest.approx(mannwhitneyu(positive, negative).statistic / pairs)
    assert AUC.of(negative, positive).value == pytest.approx(1 - found.value)
    low, high = found.interval
    assert 0 < low < found.value < high < 1
    for end in (low, high):
        q1, q2, more = end / (2 - end), 2 * end**2 / (1 + end), (n_positive + n_negative) / 2 - 1
        variance = (end * (1 - end) + more * (q1 + q2 - 2 * end**2)) / pairs  # Hanley and McNeil (1982)
        assert (found.value - end) ** 2 == pytest.approx(1.959964**2 * variance, rel=1e-4)
    assert AUC(1.0, n_positive, n_negative).interval[1] == 1 > AUC(1.0, n_positive, n_negative).interval[0] > 0.5
    with pytest.raises(ValueError, match="both groups"):
        AUC.of([], negative)


@pytest.mark.parametrize(("true", "n_positive", "n_negative"), [(0.7, 20, 20), (0.95, 12, 40), (0.99, 50, 50)])
def test_the_interval_of_an_auc_covers(true, n_positive, n_negative):
    rng, n_draws = np.random.default_rng(1), 400
    shift, covered = math.sqrt(2) * norm.ppf(true), 0
    for _ in range(n_draws):
        positive, negative = rng.normal(shift, 1, n_positive), rng.normal(0, 1, n_negative)
        low, high = AUC(float((positive[:, None] > negative).mean()), n_positive, n_negative).interval
        covered += low <= true <= high
    assert 0.92 < covered / n_draws < 1
