"""Rates, means and their differences, with intervals and tests that match how they were measured."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

_Z = NormalDist().inv_cdf(0.975)


def _mean(values: Any) -> Any:
    return values.mean(-1)


@dataclass(frozen=True)
class Rate:
    """A fraction 0–1 with its 95% Wilson score interval.

    Examples:
        >>> print(Rate(1, 4))
        0.25 [0.05, 0.70]
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n or self.n == 0:
            raise ValueError(f"a rate needs 0 <= count <= n and n > 0, not {self.count} of {self.n}")

    @classmethod
    def of(cls, flags: Sequence[bool]) -> "Rate":
        """The fraction of true flags."""
        return cls(sum(map(bool, flags)), len(flags))

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927): well behaved at 0 and 1, where p ± 1.96·SE is not."""
        p, n, z2 = self.value, self.n, _Z * _Z
        center = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)

    def describe(self) -> dict[str, float | int]:
        """The rate, its interval and its counts as JSON values."""
        low, high = self.interval
        return {"rate": self.value, "low": low, "high": high, **asdict(self)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Paired:
    """The same prompts before and after: how many changed, and whether that is more than chance.

    Examples:
        >>> before, after = [True, True, True, False], [False, False, True, False]
        >>> Paired.of(before, after).difference
        -0.5
    """

    both: int
    only_before: int
    only_after: int
    neither: int

    def __post_init__(self) -> None:
        counts = (self.both, self.only_before, self.only_after, self.neither)
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"a paired comparison needs counts of at least one prompt, not {counts}")

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> "Paired":
        """Flags of the same prompts in the same order.

        Raises:
            ValueError: they are not as many, or none.
        """
        pairs = Counter((bool(a), bool(b)) for a, b in zip(before, after, strict=True))
        return cls(pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False])

    @property
    def n(self) -> int:
        return self.both + self.only_before + self.only_after + self.neither

    @property
    def difference(self) -> float:
        """Rate after minus rate before."""
        return (self.only_after - self.only_before) / self.n

    @property
    def p_value(self) -> float:
        """McNemar's test, exact and two-sided: of the prompts that changed, as many each way as by a fair coin."""
        from scipy.stats import binomtest

        changed = self.only_before + self.only_after
        return 1.0 if changed == 0 else float(binomtest(self.only_after, changed).pvalue)

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the difference by Newcombe (1998, method 10): Wilson's limits of both rates, and their correlation.

        Over rates and correlations of all sizes it covers 95–97% on average for 8 to 100 prompts; for rates of 0.05 to
        0.95 at worst 90% (89% for 8), for rates nearer to 0 and 1 down to 84% at any n, as Wilson's own.
        """
        before, after = Rate(self.both + self.only_before, self.n), Rate(self.both + self.only_after, self.n)
        (low_b, high_b), (low_a, high_a) = before.interval, after.interval
        down, up = after.value - low_a, high_a - after.value
        down_b, up_b = before.value - low_b, high_b - before.value
        phi = self._correlation
        low = math.sqrt(max(0.0, down**2 - 2 * phi * down * up_b + up_b**2))
        high = math.sqrt(max(0.0, up**2 - 2 * phi * up * down_b + down_b**2))
        return max(-1.0, self.difference - low), min(1.0, self.difference + high)

    @property
    def _correlation(self) -> float:
        """φ of before and after, a positive one with Newcombe's continuity correction; 0 where one never varies."""
        counts = (
            self.both + self.only_before,
            self.only_after + self.neither,
            self.both + self.only_after,
            self.only_before + self.neither,
        )
        excess = float(self.both * self.neither - self.only_before * self.only_after)
        if excess > 0:
            excess = max(0.0, excess - self.n / 2)
        return excess / math.sqrt(math.prod(counts)) if all(counts) else 0.0

    def describe(self) -> dict[str, float | int]:
        """Difference, interval and exact p as JSON values."""
        low, high = self.interval
        changed = {"only_before": self.only_before, "only_after": self.only_after}
        return {"difference": self.difference, "low": low, "high": high, "p": self.p_value, "n": self.n, **changed}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{signed(self.difference)} [{signed(low)}, {signed(high)}], p {p_text(self.p_value)}"


@dataclass(frozen=True)
class AUC:
    """The probability that a value of one group exceeds one of another, ties half, with its 95% interval.

    Examples:
        >>> AUC.of([2.0, 3.0], [0.0, 1.0]).value, AUC.of([0.0, 1.0], [0.0, 1.0]).value
        (1.0, 0.5)
    """

    value: float
    n_positive: int
    n_negative: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1 or min(self.n_positive, self.n_negative) < 1:
            sizes = f"groups of {self.n_positive} and {self.n_negative}"
            raise ValueError(f"an AUC needs a value of 0 to 1 and both groups, not {self.value} of {sizes}")

    @classmethod
    def of(cls, positive: Sequence[float], negative: Sequence[float]) -> "AUC":
        """Mann and Whitney's U over the number of pairs.

        Raises:
            ValueError: a group is empty.
        """
        pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
        return cls(math.fsum(pairs) / max(1, len(pairs)), len(positive), len(negative))

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe (2006, method 5): a score interval, which has a width also at 0 and 1.

        Over normal groups of 10 to 100 and values of 0.6 to 0.99 it covers 94 to 99%.
        """
        return self._limit(0.0), self._limit(1.0)

    def _limit(self, end: float) -> float:
        """The value between the estimate and an end, at which the estimate is just not surprising, by halving."""
        inside, outside = self.value, end
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(self.value - middle) <= _Z * self._error(middle):
                inside = middle
            else:
                outside = middle
        return inside

    def _error(self, value: float) -> float:
        """Standard error of U, Hanley and McNeil's with the mean of both sizes, if this were the true value."""
        rest = 1 - value
        more = 1 + ((self.n_positive + self.n_negative) / 2 - 1) * (rest / (2 - value) + value / (1 + value))
        return math.sqrt(value * rest * more / (self.n_positive * self.n_negative))

    def describe(self) -> dict[str, float | int]:
        """The value, its interval and both sizes as JSON values."""
        low, high = self.interval
        return {"auc": self.value, "low": low, "high": high, **{k: v for k, v in asdict(self).items() if k != "value"}}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def signed(value: float, decimals: int = 2) -> str:
    """A difference with its sign; none before zero.

    Examples:
        >>> signed(-0.5)
        '−0.50'
    """
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def p_text(p: float) -> str:
    """A p-value as papers have it: = 0.03, < 0.001.

    Examples:
        >>> p_text(0.034)
        '= 0.034'
    """
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979): below 0.05 where the family errs in at most 5% of cases.

    Examples:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95% interval by Student's t: mean ± t(n − 1)·s/√n; one value has no width.

    Examples:
        >>> mean, low, high = mean_interval([1.0, 2.0, 6.0])
        >>> low < mean == 3.0 < high
        True

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, mean, mean
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def ratio_of_means(of: Any, over: Any) -> Any:
    """A statistic for `bootstrap_interval`: the mean of one sample over that of the other."""
    return of.mean(-1) / over.mean(-1)


def bootstrap_interval(
    *samples: Sequence[float], statistic: Callable[..., Any] = _mean, n_resamples: int = 1999, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of per-prompt numbers and its 95% interval by the BCa bootstrap (Efron 1987), seeded.

    For ratios, whose parts vary together. Several samples are of the same prompts and are drawn together. Where all
    values are equal, or the statistic never changes, it has no width; where drawn samples leave it without bounds (a
    divisor that can be 0), its limits are NaN.

    Examples:
        >>> mean, low, high = bootstrap_interval([1.0, 2.0, 6.0, 4.0])
        >>> low < mean == 3.25 < high
        True

    Args:
        statistic: of arrays `[..., prompt]`, along the last axis, such as `ratio_of_means`; of one sample the mean.

    Raises:
        ValueError: there are no values, or the samples are not of the same prompts.
    """
    import numpy as np
    from scipy.stats import bootstrap

    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = {len(each) for each in arrays}
    if len(n) != 1 or n == {0}:
        raise ValueError("a bootstrap needs values, and as many in every sample")
    value = float(statistic(*arrays))
    if n == {1} or all((each == each[0]).all() for each in arrays):
        return value, value, value
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        resampled = bootstrap(
            arrays,
            lambda *drawn, axis: statistic(*(np.moveaxis(each, axis, -1) for each in drawn)),
            paired=True,
            vectorized=True,
            n_resamples=n_resamples,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    if np.abs(resampled.bootstrap_distribution - value).max() <= 1e-12 * abs(value):
        return value, value, value
    low, high = (float(limit) for limit in resampled.confidence_interval)
    return (value, low, high) if math.isfinite(low + high) else (value, math.nan, math.nan)
