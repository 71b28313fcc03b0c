"""How often intervals hold what they should: `python -m benchmarks.coverage` writes the table of docs/statistics.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refusal_mi.files import write_text
from refusal_mi.stats import Paired, Rate, bootstrap_interval, mean_interval

PAGE = Path(__file__).parent.parent / "docs" / "statistics.md"
START, END = "<!-- made by benchmarks/coverage.py -->\n", "<!-- end -->"
SIZES, N_DRAWS = (8, 16, 32, 100), 1000
Interval = tuple[float, ...]
Draws = Any


def main() -> None:
    """Draw, count and write."""
    rng = np.random.default_rng(0)
    lines = [
        "| " + " | ".join(["what", "interval", *(f"n = {n}" for n in SIZES)]) + " |",
        "|---" * (2 + len(SIZES)) + "|",
    ]
    for what, name, cover in rows():
        lines.append("| " + " | ".join([what, name, *(f"{cover(rng, n):.3f}" for n in SIZES)]) + " |")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    write_text(PAGE, before + START + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


def rows() -> list[tuple[str, str, Callable[[Any, int], float]]]:
    """What is estimated, by which interval, and how to measure its coverage for n prompts."""
    t, z = mean_interval, _normal
    bca = lambda values: bootstrap_interval(values, n_resamples=999)  # noqa: E731
    return [
        ("rate, of 0.05 to 0.95", "Wilson (used)", _rates),
        ("difference of paired rates", "Newcombe (used)", _paired(lambda pair: pair.interval)),
        ("difference of paired rates", "two Wilson intervals' ends", _paired(_ends)),
        ("mean, normal", "Student's t (used)", _means(lambda rng, n: rng.normal(1, 1, n), 1.0, t)),
        ("mean, normal", "± 1.96 standard errors", _means(lambda rng, n: rng.normal(1, 1, n), 1.0, z)),
        ("mean, log-normal (as KL)", "Student's t (used)", _means(lambda rng, n: rng.lognormal(0, 1, n), np.e**0.5, t)),
        ("mean, log-normal (as KL)", "BCa bootstrap", _means(lambda rng, n: rng.lognormal(0, 1, n), np.e**0.5, bca)),
        ("ratio of means", "BCa bootstrap of both (used)", _ratios(True)),
        ("ratio of means", "Student's t, the divisor held fixed", _ratios(False)),
    ]


def _normal(values: list[float]) -> Interval:
    half = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)


def _rates(rng: Draws, n: int) -> float:
    known = [Rate(count, n).interval for count in range(n + 1)]
    p = rng.uniform(0.05, 0.95, 20 * N_DRAWS)
    return float(np.mean([known[k][0] <= q <= known[k][1] for k, q in zip(rng.binomial(n, p), p, strict=True)]))


def _paired(interval: Callable[[Paired], Interval]) -> Callable[[Any, int], float]:
    """Over rates before and after, and correlations from none to nearly all that there can be."""

    def cover(rng: Draws, n: int) -> float:
        held = 0
        for _ in range(5 * N_DRAWS):
            p, q = rng.uniform(0.05, 0.95, 2)
            both = p * q + rng.uniform(0, 0.9) * (min(p, q) - p * q)
            low, high = interval(Paired(*rng.multinomial(n, [both, p - both, q - both, 1 - p - q + both]).tolist()))
            held += low <= q - p <= high
        return held / (5 * N_DRAWS)

    return cover


def _ends(pair: Paired) -> Interval:
    before, after = Rate(pair.both + pair.only_before, pair.n), Rate(pair.both + pair.only_after, pair.n)
    return after.interval[0] - before.interval[1], after.interval[1] - before.interval[0]


def _means(
    draw: Callable[[Any, int], Any], true: float, interval: Callable[[list[float]], Interval]
) -> Callable[[Any, int], float]:
    def cover(rng: Draws, n: int) -> float:
        found = [interval(draw(rng, n).tolist()) for _ in range(N_DRAWS)]
        return float(np.mean([low <= true <= high for _, low, high in found]))

    return cover


def _ratios(together: bool) -> Callable[[Any, int], float]:
    """A shift of 0.6 of a gap that varies between pairs, with noise of its own."""

    def cover(rng: Draws, n: int) -> float:
        held = 0
        for _ in range(N_DRAWS):
            gap = rng.normal(8, 3, n)
            shift = 0.6 * gap + rng.normal(0, 1, n)
            if together:
                ratio = lambda a, b: a.mean(-1) / b.mean(-1)  # noqa: E731
                _, low, high = bootstrap_interval(shift.tolist(), gap.tolist(), statistic=ratio, n_resamples=999)
            else:
                _, low, high = mean_interval((shift / gap.mean()).tolist())
            held += low <= 0.6 <= high
        return held / N_DRAWS

    return cover


if __name__ == "__main__":
    main()
