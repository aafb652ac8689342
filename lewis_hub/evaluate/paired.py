"""Paired tests of models on the same items; no distribution is assumed.

`first` and `second` are aligned sequences, one number per item; a difference is first minus second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.scores import (
    MERGED,
    MetricResult,
    MetricScore,
    ModelResult,
    PairedTest,
    Scores,
    TaskResult,
    TaskScores,
)

RESAMPLES = 10_000
Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal
SEED = 42  # of the paired bootstrap: the same items give the same interval


@dataclass(frozen=True)
class MeanDifference:
    """A difference of means, its 95 % interval and a two-sided p-value."""

    difference: float
    ci95: tuple[float, float]
    p: float


def compare_items(first: Sequence[float], second: Sequence[float], seed: int) -> MeanDifference:
    """Compare 0/1 items by McNemar's exact test, other numbers by the paired bootstrap."""
    if {*first, *second} <= {0.0, 1.0}:
        return compare_binary(first, second)
    return compare_by_bootstrap(first, second, seed)


def compare_binary(first: Sequence[float], second: Sequence[float]) -> MeanDifference:
    """Exact McNemar's test, and Newcombe's interval for a difference of paired proportions."""
    pairs = list(zip(first, second, strict=True))
    both, neither = pairs.count((1, 1)), pairs.count((0, 0))
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    return MeanDifference(
        difference=(only_first - only_second) / len(pairs),
        ci95=newcombe_interval(both, only_first, only_second, neither),
        p=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value: twice the smaller binomial(n, 1/2) tail of the discordant pairs.

    The sum is computed in integers, so it is exact for any count.
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
    """The correlation of the two outcomes; a positive one is corrected for continuity."""
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


def compare_by_bootstrap(
    first: Sequence[float], second: Sequence[float], seed: int
) -> MeanDifference:
    """The percentile interval and p-value of a mean difference over resampled items.

    The p-value is the share of resampled differences at least as far from the observed one as that
    is from zero, the observed one counted in (Davison and Hinkley, Bootstrap Methods, 1997, 4.2).
    """
    differences = np.subtract(first, second, dtype=np.float64)
    observed = float(differences.mean())
    means = _resampled_means(differences, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    slack = 1e-12 * float(np.abs(differences).max())  # equal up to rounding is equal
    extreme = int(np.count_nonzero(np.abs(means - observed) >= abs(observed) - slack))
    return MeanDifference(observed, (float(low), float(high)), (extreme + 1) / (RESAMPLES + 1))


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of RESAMPLES samples with replacement, in chunks that fit into a cache."""
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


def compare(results: Mapping[str, ModelResult]) -> Scores:
    """Put the models side by side, and test the model `merged` against each of the others.

    Holm's p-values are adjusted over all tests against the same model.

    Raises:
        EvaluationError: two models did not answer the same items of the same tasks.
    """
    reference_label, reference = next(iter(results.items()))
    for label, result in results.items():
        _check_same_items(reference_label, reference, label, result)
    has_merged = MERGED in results
    rivals = {label: each for label, each in results.items() if has_merged and label != MERGED}
    tests = [test for each in rivals.items() for test in _paired_tests(results[MERGED], *each)]
    return Scores(
        {
            name: TaskScores(
                n=len(task.documents),
                version=task.version,
                models={label: _scores(result.tasks[name]) for label, result in results.items()},
                paired=tuple(test for task_name, test in tests if task_name == name),
            )
            for name, task in reference.tasks.items()
        },
        reference.settings,
    )


def _scores(task: TaskResult) -> dict[str, MetricScore]:
    """A higher value is better unless the task says otherwise."""
    return {
        key: MetricScore(metric.value, metric.stderr, metric.higher_is_better is not False)
        for key, metric in task.metrics.items()
    }


def _check_same_items(
    reference_label: str, reference: ModelResult, label: str, result: ModelResult
) -> None:
    if result.tasks.keys() != reference.tasks.keys():
        problem = (
            f"{reference_label} was scored on {', '.join(sorted(reference.tasks))}; "
            f"{label} on {', '.join(sorted(result.tasks))}."
        )
        raise EvaluationError("compare", problem, "Evaluate both on the same tasks.")
    for name, task in reference.tasks.items():
        other = result.tasks[name]
        if (task.version, task.documents) == (other.version, other.documents):
            continue
        same = len(set(task.documents) & set(other.documents))
        problem = (
            f"{reference_label} and {label} did not answer the same items: "
            f"{len(task.documents)} of version {task.version} against "
            f"{len(other.documents)} of version {other.version}, {same} in common."
        )
        raise EvaluationError(name, problem, "Evaluate both again with one version and one limit.")


def _paired_tests(
    merged: ModelResult, label: str, rival: ModelResult
) -> Iterator[tuple[str, PairedTest]]:
    """(task, test) for each metric that is a mean over items."""
    results = [
        (name, key, paired(metric, rival.tasks[name].metrics[key]))
        for name, task in merged.tasks.items()
        for key, metric in task.metrics.items()
        if key in rival.tasks[name].metrics
    ]
    tests = [(name, key, test) for name, key, test in results if test]
    adjusted = holm([test.p for *_, test in tests])
    for (name, key, test), p_holm in zip(tests, adjusted, strict=True):
        yield name, PairedTest(key, label, test.difference, test.ci95, test.p, p_holm)


def paired(mine: MetricResult, theirs: MetricResult) -> MeanDifference | None:
    """Test two results over the items for which both have a number.

    Returns:
        None if there is no such item, the metric is not a mean over items, or the numbers are too
        large to be subtracted.
    """
    if mine.values is None or theirs.values is None:
        return None
    pairs = [
        (first, second)
        for first, second in zip(mine.values, theirs.values, strict=True)
        if first is not None and second is not None
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        test = compare_items([a for a, _ in pairs], [b for _, b in pairs], SEED) if pairs else None
    return test if test and all(map(math.isfinite, (test.difference, *test.ci95))) else None
