"""Magnitudes of task vectors, sampled and counted to find the threshold of the k largest.

A magnitude is the 31 bits of a float32 without its sign; their order is that of the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from lewis_hub.kernels.calls import (
    ABOVE,
    AT_HIGH,
    AT_LOW,
    BLOCK,
    HIGH_BINS,
    INSIDE,
    LOW_BITS,
    LOW_MASK,
    RUN,
    Bytes,
    Floats,
    Halves,
    Integers,
    Words,
)
from lewis_hub.kernels.compiler import ADDRESS, ADDRESSES, INTEGER, INTEGERS, entry, loop
from lewis_hub.kernels.decode import size_of, value_at, views_of, widen

U32 = np.uint32


@loop
def find(flags: Any, n: int, places: Halves) -> int:
    """Write where flags are set, in ascending order, into (n + 8,); returns their number.

    Flags are bytes, 0 or 1, followed by zeros up to a multiple of 8. Eight flags with a set one
    among them are processed without branches: those were mispredicted.
    """
    words, flags = carray(flags, (n + 7) >> 3, np.uint64), carray(flags, n + 8, np.uint8)
    found = 0
    for w in range(words.size):
        if words[w]:
            for i in range(8 * w, 8 * w + 8):
                places[found] = i
                found += flags[i]
    return found


@loop
def magnitudes(raw: Any, kind: int, first: int, base: Floats, sizes: Words) -> None:
    """Write the magnitudes of a task vector: elements [first, first + n) of an expert - base."""
    views = views_of(raw, kind, first, sizes.size)
    for i in range(sizes.size):
        sizes[i] = size_of(value_at(views, kind, i) - base[i])


@entry(ADDRESSES, INTEGERS, INTEGER, ADDRESS, INTEGER, ADDRESSES, ADDRESS)
def sample(  # noqa: PLR0913
    raw: Any, kinds: Any, n_experts: int, places: Any, n_places: int, found: Any, scratch: Any
) -> int:
    """Write the magnitudes of each expert's task vector, RUN elements from each place on."""
    starts = carray(places, n_places, np.int64)
    base = carray(scratch, RUN, np.float32)
    for i in range(n_places):
        widen(raw[0], kinds[0], starts[i], base)
        for e in range(n_experts):
            sizes = carray(found[e], (n_places, RUN), np.uint32)[i]
            magnitudes(raw[e + 1], kinds[e + 1], starts[i], base, sizes)
    return 0


@entry(
    *(ADDRESSES, INTEGERS, INTEGER, ADDRESS, INTEGER),
    *(ADDRESS, ADDRESS, ADDRESSES, INTEGER, ADDRESSES),
)
def sort_out(  # noqa: PLR0913
    raw: Any,
    kinds: Any,
    n: int,
    chosen: Any,
    n_chosen: int,
    brackets: Any,
    tallies: Any,
    inside: Any,
    capacity: int,
    scratch: Any,
) -> int:
    """Count magnitudes above a bracket and at its ends; collect those inside it."""
    chosen = carray(chosen, n_chosen, np.int64)
    brackets = carray(brackets, (n_chosen, 2), np.int64)
    tallies = carray(tallies, (n_chosen, 4), np.int64)
    rows = carray(scratch[0], (2, BLOCK), np.float32)
    flags, places = carray(scratch[1], BLOCK, np.uint8), carray(scratch[2], BLOCK + 8, np.uint16)
    for first in range(0, n, BLOCK):
        m = min(BLOCK, n - first)
        base, values = rows[0][:m], rows[1][:m]
        sizes = values.view(np.uint32)
        widen(raw[0], kinds[0], first, base)
        for i in range(m, BLOCK):
            flags[i] = 0
        for c in range(n_chosen):
            source = chosen[c] + 1
            tally = tallies[c]
            magnitudes(raw[source], kinds[source], first, base, sizes)
            count(sizes, brackets[c, 0], brackets[c, 1], tally, flags)
            found = find(scratch[1], m, places)
            collected = carray(inside[c], capacity, np.uint32)
            fitting = min(found, capacity - tally[INSIDE])
            for i in range(fitting):
                collected[tally[INSIDE] + i] = sizes[places[i]]
            tally[INSIDE] += fitting
    return 0


@loop
def count(sizes: Words, low: int, high: int, tally: Integers, flags: Bytes) -> None:
    """Count the magnitudes above `high`, at `high` and at `low`; flag those in between."""
    least, most = np.int32(low), np.int32(high)
    n_above = n_at_high = n_at_low = U32(0)
    for i in range(sizes.size):
        size = np.int32(sizes[i])
        n_above = U32(n_above + U32(size > most))
        n_at_high = U32(n_at_high + U32(size == most))
        n_at_low = U32(n_at_low + U32(size == least))
        flags[i] = np.uint8((size > least) & (size < most))
    tally[ABOVE] += n_above
    tally[AT_HIGH] += n_at_high
    tally[AT_LOW] += n_at_low


@entry(ADDRESSES, INTEGERS, INTEGER, ADDRESS, INTEGER, INTEGERS, ADDRESSES, ADDRESSES)
def count_bits(  # noqa: PLR0913
    raw: Any, kinds: Any, n: int, chosen: Any, n_chosen: int, high: Any, counts: Any, scratch: Any
) -> int:
    """Count magnitudes by their high 16 bits, or those with certain high bits by the low 15."""
    chosen = carray(chosen, n_chosen, np.int64)
    rows = carray(scratch[0], (2, BLOCK), np.float32)
    for first in range(0, n, BLOCK):
        base, values = rows[0][: n - first], rows[1][: n - first]
        sizes = values.view(np.uint32)
        widen(raw[0], kinds[0], first, base)
        for c in range(n_chosen):
            source = chosen[c] + 1
            magnitudes(raw[source], kinds[source], first, base, sizes)
            bins = carray(counts[c], HIGH_BINS, np.uint32)
            if high[c] < 0:
                for i in range(sizes.size):
                    bins[sizes[i] >> U32(LOW_BITS)] += U32(1)
            else:
                for i in range(sizes.size):
                    if sizes[i] >> U32(LOW_BITS) == U32(high[c]):
                        bins[sizes[i] & U32(LOW_MASK)] += U32(1)
    return 0
