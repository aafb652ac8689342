"""The ranks of a row's magnitudes, and the votes that they decide: what DELLA needs.

Magnitudes are sorted by their 31 bits, ten or eleven at a time from the lowest (a radix sort), so
that equal ones keep the order of their indices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lewis_hub.merge.bits import ABSOLUTE, as_bits, inner

DIGIT_BITS, N_DIGITS = 10, 3  # the last one has a bit more
N_VALUES = 1 << 11  # of the last digit; the others have half as many
LAST = N_DIGITS - 1
ONE = np.int32(1)


class Sorting(NamedTuple):
    """Room to rank one row in and to draw from it; nothing in it is kept."""

    keys: Any  # (2, row) uint64: a magnitude above, the place it was found at below
    counts: Any  # (N_DIGITS, N_VALUES) int32
    ranks: Any  # (row,) int32: the result
    halves: Any  # (row + 2,) uint32: random bits
    drawn: Any  # (row,) float32: entries times their factors


@inner
def digit(key: Any, which: int) -> Any:
    """One of the digits of a key's magnitude."""
    bits = np.int64(key >> np.uint64(32 + DIGIT_BITS * which))
    return bits if which == LAST else bits & np.int64((1 << DIGIT_BITS) - 1)


@inner
def rank(delta: Any, n: int, room: Sorting) -> None:
    """Rank a row by magnitude, the smallest 0; of equal ones the smaller index comes first."""
    counts, source, target = room.counts, room.keys[0], room.keys[1]
    for which in range(N_DIGITS):
        for value in range(N_VALUES):
            counts[which, value] = 0
    for i in range(n):
        key = (np.uint64(as_bits(delta[i]) & ABSOLUTE) << np.uint64(32)) | np.uint64(i)
        source[i] = key
        for which in range(N_DIGITS):
            counts[which, digit(key, which)] += ONE
    first = source[0]
    for which in range(N_DIGITS):
        if counts[which, digit(first, which)] == n:
            continue  # all alike: nothing to sort by
        begin = np.int32(0)
        for value in range(N_VALUES):
            here = counts[which, value]
            counts[which, value] = begin
            begin += here
        for j in range(n):
            place = digit(source[j], which)
            target[counts[which, place]] = source[j]
            counts[which, place] += ONE
        source, target = target, source
    for j in range(n):
        room.ranks[np.int64(source[j] & np.uint64(0xFFFFFFFF))] = j
