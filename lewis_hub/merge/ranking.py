"""The ranks of a row's magnitudes, and the votes that they decide: what DELLA needs.

Magnitudes are sorted by their 31 bits, ten or eleven at a time from the lowest (a radix sort), so
that equal ones keep the order of their indices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lewis_hub.merge.bits import ABSOLUTE, as_bits, inner

LOW, MIDDLE = np.uint32(10), np.uint32(20)  # where the second and the third digit begin
N_VALUES = 1 << 11  # of the third digit; the others have half as many
DIGIT = np.uint32((1 << 10) - 1)
ONE = np.int32(1)


class Sorting(NamedTuple):
    """Room to sort one row in; nothing in it is kept."""

    order: Any  # (2, row) int32
    counts: Any  # (3, N_VALUES) int32
    ranks: Any  # (row,) int32: the result


@inner
def digit(bits: Any, which: int) -> Any:
    """One of the three digits of a magnitude."""
    if which == 0:
        return np.int64(bits & DIGIT)
    if which == 1:
        return np.int64((bits >> LOW) & DIGIT)
    return np.int64(bits >> MIDDLE)


@inner
def rank(delta: Any, n: int, room: Sorting) -> None:
    """Rank a row by magnitude, the smallest 0; of equal ones the smaller index comes first."""
    counts = room.counts
    for which in range(3):
        for value in range(N_VALUES):
            counts[which, value] = 0
    for i in range(n):
        bits = as_bits(delta[i]) & ABSOLUTE
        counts[0, digit(bits, 0)] += ONE
        counts[1, digit(bits, 1)] += ONE
        counts[2, digit(bits, 2)] += ONE
    source, target = room.order[0], room.order[1]
    for i in range(n):
        source[i] = i
    first = as_bits(delta[0]) & ABSOLUTE
    for which in range(3):
        if counts[which, digit(first, which)] == n:
            continue  # all alike: nothing to sort by
        begin = np.int32(0)
        for value in range(N_VALUES):
            here = counts[which, value]
            counts[which, value] = begin
            begin += here
        for j in range(n):
            i = source[j]
            place = digit(as_bits(delta[i]) & ABSOLUTE, which)
            target[counts[which, place]] = i
            counts[which, place] += ONE
        source, target = target, source
    for j in range(n):
        room.ranks[source[j]] = j
