"""Statistics of two models on the same items. Pure functions of numbers; nothing is assumed normal.

`first` and `second` are aligned sequences, one number per item; a difference is first minus second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Z95 = 1.959963984540054  # the 97.5 % point of the standard normal


@dataclass(frozen=True)
class Comparison:
    """A difference of means, its 95 % interval and a two-sided p-value."""

    difference: float
    ci95: tuple[float, float]
    p: float


def compare_items(first: Sequence[float], second: Sequence[float], seed: int) -> Comparison:
    """Exact McNemar and Newcombe's interval for 0/1 items, the paired bootstrap for all others."""
    if {*first, *second} <= {0.0, 1.0}:
        return compare_binary(first, second)
    return compare_by_bootstrap(first, second, seed)


def compare_binary(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Exact McNemar's test, and Newcombe's interval for a difference of paired proportions."""
    pairs = list(zip(first, second, strict=True))
    both, neither = pairs.count((1, 1)), pairs.count((0, 0))
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    return Comparison(
        difference=(only_first - only_second) / len(pairs),
        ci95=newcombe_interval(both, only_first, only_second, neither),
        p=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value: twice the smaller binomial(n, 1/2) tail of the discordant pairs.

    Computed in integers, so it is right to the last bit for any count.
    """
    n = only_first + only_second
    term, tail = 1, 1  # term is (n over k), from k = 0
    for k in range(min(only_first, only_second)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[float, float]:
    """The 95 % interval for the difference of two paired proportions.

    Source:
        R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: Wilson's intervals
        of the two proportions, combined with their correlation phi. It stays inside [-1, 1] and
        keeps a width when no pair is discordant.
    """
    n = both + only_first + only_second + neither
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (low1, high1), (low2, high2) = wilson_interval(p1, n), wilson_interval(p2, n)
    phi = _phi(both, only_first, only_second, neither)

    def spread(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))

    difference = (only_first - only_second) / n
    below, above = spread(p1 - low1, high2 - p2), spread(high1 - p1, p2 - low2)
    return difference - below, difference + above


def wilson_interval(proportion: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion over n items."""
    centre = proportion + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt((proportion * (1 - proportion) + Z95**2 / (4 * n)) / n)
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """The correlation of the two outcomes, a positive one corrected for continuity."""
    n = both + only_first + only_second + neither
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if margins == 0:
        return 0.0
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        return max(0.0, covariance - n / 2) / math.sqrt(margins)
    return covariance / math.sqrt(margins)


def compare_by_bootstrap(first: Sequence[float], second: Sequence[float], seed: int) -> Comparison:
    """The percentile interval and p-value of a mean difference over resampled items.

    The p-value is the share of resampled differences at least as far from the observed one as that
    is from zero, the observed one counted in (Davison and Hinkley, Bootstrap Methods, 1997, 4.2).
    """
    differences = np.subtract(first, second, dtype=np.float64)
    observed = float(differences.mean())
    means = _resampled_means(differences, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    slack = 1e-12 * float(np.abs(differences).max())  # equal up to rounding counts as equal
    extreme = int(np.count_nonzero(np.abs(means - observed) >= abs(observed) - slack))
    return Comparison(observed, (float(low), float(high)), (extreme + 1) / (RESAMPLES + 1))


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of RESAMPLES samples with replacement, as many at a time as a cache holds."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, 100_000 // len(values))
    means = [
        values[
            generator.integers(len(values), size=(min(rows, RESAMPLES - done), len(values)))
        ].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(means)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment, in the order given (Scand. J. Statistics 6, 1979, 65-70)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)
