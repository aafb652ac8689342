"""The kernels that look for a threshold: what the magnitudes of task vectors are.

A magnitude is the 31 bits of a float32 without its sign; their order is that of the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lewis_hub.merge.bits import ABSOLUTE, as_bits, compiled, inner, widen
from lewis_hub.merge.kernels import subtract
from lewis_hub.merge.operands import (
    ABOVE,
    AT_HIGH,
    AT_LOW,
    BLOCK,
    INSIDE,
    LOW_BITS,
    LOW_MASK,
    TRIM,
)

STRIP = 16  # elements that are looked at together, to pass over what is rare
ONE = np.uint32(1)


@compiled
def magnitudes(raw: Any, kinds: Any, n: int, found: Any) -> None:
    """Write the magnitudes of each expert's task vector.

    Args:
        raw: (n_sources, bytes) uint8: a piece of each source, the base first.
        kinds: (n_sources,) int64: formats of `bits`.
        n: elements in the piece.
        found: (n_experts, >= n) uint32, written.
    """
    base, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(found.shape[0]):
            subtract(raw[e + 1], kinds[e + 1], first, length, base, delta)
            for i in range(length):
                found[e, first + i] = as_bits(delta[i]) & ABSOLUTE


@compiled
def sort_out(  # noqa: PLR0913
    raw: Any, kinds: Any, n: int, modes: Any, low: Any, high: Any, tally: Any, inside: Any
) -> None:
    """Count the magnitudes above a bracket and on its ends, and collect those inside it.

    Args:
        raw: as for `magnitudes`.
        kinds: as for `magnitudes`.
        n: elements in the piece.
        modes: (n_experts,) int64: only those that are trimmed are looked at.
        low: (n_experts,) uint32: the lower end of the bracket.
        high: (n_experts,) uint32: its upper end.
        tally: (n_experts, 4) int64, added to: above, at high, at low, inside.
        inside: (n_experts, room + BLOCK) uint32, filled as far as the tally's last column says;
            where that reaches `room`, some found none.
    """
    base, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    found = np.empty(BLOCK, np.uint32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(modes.size):
            if modes[e] != TRIM:
                continue
            subtract(raw[e + 1], kinds[e + 1], first, length, base, delta)
            above, at_high, at_low = np.uint32(0), np.uint32(0), np.uint32(0)
            bottom, top = low[e], high[e]
            for i in range(length):
                magnitude = as_bits(delta[i]) & ABSOLUTE
                found[i] = magnitude
                above += np.uint32(magnitude > top)
                at_high += np.uint32(magnitude == top)
                at_low += np.uint32(magnitude == bottom)
            tally[e, ABOVE] += above
            tally[e, AT_HIGH] += at_high
            tally[e, AT_LOW] += at_low
            tally[e, INSIDE] = collect(found, length, bottom, top, inside[e], tally[e, INSIDE])


@inner
def collect(found: Any, n: int, low: Any, high: Any, inside: Any, n_inside: Any) -> Any:
    """Put down what lies between low and high, strip by strip: most strips hold none of it.

    Returns:
        How many lie in `inside` now, at most its room.
    """
    begin = low + ONE
    # one comparison for two: below `begin`, the difference wraps around
    width = high - begin if high > low else np.uint32(0)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        hits = np.uint32(stop - start < STRIP)
        if not hits:
            for i in range(STRIP):
                hits |= np.uint32((found[start + i] - begin) < width)
        if hits:
            for i in range(start, stop):  # the next one goes on top of an unwanted one
                inside[n_inside] = found[i]
                n_inside += np.int64((found[i] - begin) < width)
    return min(n_inside, inside.size - BLOCK)


@compiled
def count_high(raw: Any, kinds: Any, n: int, modes: Any, counts: Any) -> None:
    """Count the magnitudes of task vectors by their high 16 bits.

    Args:
        raw: as for `magnitudes`.
        kinds: as for `magnitudes`.
        n: elements in the piece.
        modes: (n_experts,) int64: only those that are trimmed are counted.
        counts: (n_experts, HIGH_BINS) uint32, added to.
    """
    base, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(modes.size):
            if modes[e] == TRIM:
                subtract(raw[e + 1], kinds[e + 1], first, length, base, delta)
                for i in range(length):
                    magnitude = as_bits(delta[i]) & ABSOLUTE
                    counts[e, magnitude >> LOW_BITS] += ONE


@compiled
def count_low(raw: Any, kinds: Any, n: int, chosen: Any, counts: Any) -> None:
    """Count, among magnitudes with the chosen high bits, by the low 15 bits.

    Args:
        raw: as for `magnitudes`.
        kinds: as for `magnitudes`.
        n: elements in the piece.
        chosen: (n_experts,) int64: the high bits; -1 where an expert is not trimmed.
        counts: (n_experts, LOW_BINS) uint32, added to.
    """
    base, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(chosen.size):
            if chosen[e] >= 0:
                high = np.uint32(chosen[e])
                subtract(raw[e + 1], kinds[e + 1], first, length, base, delta)
                for i in range(length):
                    magnitude = as_bits(delta[i]) & ABSOLUTE
                    if magnitude >> LOW_BITS == high:
                        counts[e, magnitude & LOW_MASK] += ONE
