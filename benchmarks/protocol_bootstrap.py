"""The hierarchical bootstrap of PROTOCOL.md: families, draws of tasks, draws of texts, items.

Every level is drawn with replacement, within what was drawn above it. The items of a task are drawn
once for all methods and all draws of texts, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000
SEED = 20261130
LEAST_GAP = 0.02  # nats that task arithmetic loses; a task below it has no gap to close

T = TypeVar("T")
Array = NDArray[np.float64]
Statistic = Callable[[Array, NDArray[np.bool_]], Array]


@dataclass(frozen=True)
class Place:
    """Losses at one draw of tasks and texts of a family.

    Attributes:
        losses: (n_methods, n_tasks, n_items).
        counted: (n_tasks,): whether a task has a gap to close; from all items.
    """

    family: str
    tasks: int
    texts: int
    losses: Array
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A value of all items, and what 95 % of resamples are between."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.told(2)

    def told(self, digits: int) -> str:
        """With so many digits behind the point."""
        value, low, high = (f"{x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def gap_closed(losses: Array) -> Array:
    """(L_TA - L) / (L_TA - L_experts) of each task; rows: task arithmetic, experts, a method."""
    arithmetic, experts, method = losses[0], losses[1], losses[2]
    closed: Array = (arithmetic - method) / (arithmetic - experts)
    return closed


def mean_and_worst(losses: Array, counted: NDArray[np.bool_]) -> Array:
    """Mean and lowest gap closed over tasks; rows as for `gap_closed`."""
    closed = gap_closed(losses[:, counted])
    return np.array([closed.mean(), closed.min()])


def difference(losses: Array, counted: NDArray[np.bool_]) -> Array:
    """Mean gap that the third row closes, less that of the fourth."""
    ours, other = losses[:, counted][:3], losses[:, counted][[0, 1, 3]]
    return np.array([(gap_closed(ours) - gap_closed(other)).mean()])


def lower_loss(losses: Array, counted: NDArray[np.bool_]) -> Array:  # noqa: ARG001
    """Mean loss of the second row less that of the first."""
    return np.array([(losses[1] - losses[0]).mean()])


def estimate(places: Sequence[Place], statistic: Statistic, n: int = N_RESAMPLES) -> list[Interval]:
    """The value of a statistic over all places, with bootstrap intervals."""
    values = _average(places, lambda place: statistic(place.losses.mean(-1), place.counted))
    drawn = resampled(places, statistic, n)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [Interval(*map(float, one)) for one in zip(values, low, high, strict=True)]


def p_value(places: Sequence[Place], statistic: Statistic, n: int = N_RESAMPLES) -> float:
    """Two-sided: twice the share of resamples on the rarer side of 0, at most 1."""
    drawn = resampled(places, statistic, n)[:, 0]
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (len(drawn) + 1)))


def resampled(places: Sequence[Place], statistic: Statistic, n: int = N_RESAMPLES) -> Array:
    """(n, n_values): the statistic of each resample."""
    rng = np.random.default_rng(SEED)
    by_family = [
        _grouped(own, lambda place: place.tasks)
        for own in _grouped(places, lambda place: place.family)
    ]
    return np.stack([_drawn(by_family, statistic, rng) for _ in range(n)])


def _drawn(
    by_family: Sequence[Sequence[Sequence[Place]]], statistic: Statistic, rng: np.random.Generator
) -> Array:
    """The statistic of one resample; `by_family`: family -> draw of tasks -> draws of texts."""
    of_families = []
    for own in _with_replacement(by_family, rng):
        of_draws = []
        for draw in _with_replacement(own, rng):
            _, n_tasks, n_items = draw[0].losses.shape
            items = rng.multinomial(n_items, np.full(n_items, 1 / n_items), n_tasks) / n_items
            of_draws.append(
                _mean(
                    [
                        statistic((place.losses * items).sum(-1), place.counted)
                        for place in _with_replacement(draw, rng)
                    ]
                )
            )
        of_families.append(_mean(of_draws))
    return _mean(of_families)


def _mean(values: Sequence[Array]) -> Array:
    found: Array = sum(values[1:], values[0]) / len(values)
    return found


def _average(places: Sequence[Place], value: Callable[[Place], Array]) -> Array:
    """The mean over draws of texts, then of tasks, then over families."""
    families = []
    for own in _grouped(places, lambda place: place.family):
        draws = _grouped(own, lambda place: place.tasks)
        families.append(_mean([_mean([*map(value, one)]) for one in draws]))
    return _mean(families)


def _grouped(places: Sequence[Place], key: Callable[[Place], object]) -> list[list[Place]]:
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault(key(place), []).append(place)
    return list(found.values())


def _with_replacement(drawn: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    return (drawn[n] for n in rng.integers(len(drawn), size=len(drawn)))
