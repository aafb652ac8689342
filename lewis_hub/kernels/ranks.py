"""Ranks of the magnitudes in a row, and DELLA's dropping of entries by rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from lewis_hub.kernels.compiler import loop
from lewis_hub.kernels.decode import size_of
from lewis_hub.kernels.operands import Floats

U32, U64 = np.uint32, np.uint64
LOW, MIDDLE, HIGH = 0, 9, 20  # first bits of a magnitude's digits
N_BINS = 1 << 11


@loop
def thin_row(
    values: Floats, halves: Any, below: Any, factors: Floats, keys: Any, counts: Any
) -> None:
    """Keep an entry of a row if its random bits are below what its rank allows, and rescale it.

    Args:
        values: (n,), changed.
        halves: (n,) uint32, random.
        below: (n,) uint64, by rank.
        factors: (n,), by rank.
        keys: (2, n) uint64, scratch.
        counts: (N_BINS,) uint32, scratch.
    """
    ordered = keys[sort(values, keys, counts)]
    for rank in range(values.size):
        place = U32(ordered[rank])
        kept = values[place] * factors[rank]
        values[place] = kept if U64(halves[place]) < below[rank] else np.float32(0)


@loop
def sort(values: Floats, keys: Any, counts: Any) -> int:
    """Sort the places of a row's entries by magnitude; equal ones stay in the order of the row.

    This is a radix sort of keys: a magnitude in the high half, its place in the low half. The high
    22 bits of the magnitude suffice for most task vectors of 16-bit floats. If they do not, the
    keys are sorted by all 31.

    Returns:
        The row of `keys` that is sorted.
    """
    n = values.size
    for i in range(n):
        keys[0, i] = U64(U64(size_of(values[i])) << U64(32)) | U64(i)
    pass_digits(keys[0], keys[1], counts, MIDDLE)
    pass_digits(keys[1], keys[0], counts, HIGH)
    in_order = True
    for i in range(1, n):
        in_order &= keys[0, i - 1] < keys[0, i]
    if in_order:
        return 0
    pass_digits(keys[0], keys[1], counts, LOW)
    pass_digits(keys[1], keys[0], counts, MIDDLE)
    pass_digits(keys[0], keys[1], counts, HIGH)
    return 1


@loop
def pass_digits(source: Any, target: Any, counts: Any, first_bit: int) -> None:
    """Sort keys by the 11 bits of their magnitude from `first_bit` on; the sort is stable."""
    shift, mask = U64(32 + first_bit), U64(N_BINS - 1)
    for b in range(N_BINS):
        counts[b] = U32(0)
    for i in range(source.size):
        counts[(source[i] >> shift) & mask] += U32(1)
    total = U32(0)
    for b in range(N_BINS):
        here = counts[b]
        counts[b] = total
        total = U32(total + here)
    for i in range(source.size):
        b = (source[i] >> shift) & mask
        target[counts[b]] = source[i]
        counts[b] += U32(1)
