"""Merge one piece of a tensor, all sources at once, from raw bytes to raw bytes.

A strip of every source is widened to float32, votes are computed and combined, and the result is
rounded once. A strip fits into the L1 cache. Additions are made in the order of the definitions in
`methods/`, so both give the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from lewis_hub.kernels.calls import (
    DRAW,
    EXPERT,
    EXPONENT,
    KEEP_ALL,
    KEEP_NONE,
    N_BINS,
    RANK,
    SIGN,
    TRIM,
    Floats,
    Halves,
    Words,
)
from lewis_hub.kernels.compiler import ADDRESS, ADDRESSES, INTEGER, INTEGERS, entry, loop
from lewis_hub.kernels.decode import bits_of, float_of, narrow, size_of, value_at, views_of, widen
from lewis_hub.kernels.random_bits import GOLDEN, MIX_1, MIX_2
from lewis_hub.kernels.threshold import find

U32, U64, F32 = np.uint32, np.uint64, np.float32
# Rows of the scratch array; from VOTES on a row for each expert.
BASE, BALANCE, MIXED, TOTAL, VOTES = 0, 1, 2, 3, 4
LOW, MIDDLE, HIGH = 0, 9, 20  # first bits of the digits of a magnitude when ranks are found
FLOATS, FLAGS, PLACES, WORDS, KEYS, COUNTS, LARGEST = 0, 1, 2, 3, 4, 5, 6  # scratch arrays
SHORT = 64  # entries of a row up to which insertion is faster than clearing counters


@entry(
    *(ADDRESSES, INTEGERS, INTEGER, INTEGER, INTEGER, ADDRESS, INTEGER),
    *(ADDRESS, INTEGER, ADDRESS, ADDRESS, ADDRESS, INTEGER, INTEGER, INTEGER, ADDRESSES),
)
def merge_task_vectors(  # noqa: PLR0913
    raw: Any,
    kinds: Any,
    n: int,
    first: int,
    strip: int,
    out: Any,
    out_kind: int,
    experts: Any,
    n_experts: int,
    below: Any,
    factors: Any,
    mix: Any,
    elects: int,
    normalize: int,
    row: int,
    scratch: Any,
) -> int:
    """Merge one piece of a base and its experts; the arguments are those of `calls`."""
    experts, mix = carray(experts, n_experts, EXPERT), carray(mix, 2, np.float32)
    limits = carray(below, (n_experts, row), np.uint64)
    factors = carray(factors, (n_experts, row), np.float32)
    rows = carray(scratch[FLOATS], (VOTES + n_experts, strip), np.float32)
    worst, result = carray(scratch[LARGEST], n_experts + 1, np.uint32), U32(0)
    start = 0
    while start < n:  # a range of unknown step would raise
        m = min(strip, n - start)
        base = rows[BASE][:m]
        worst[0] = max(worst[0], widen(raw[0], kinds[0], start, base))
        for e in range(n_experts):
            votes, expert = rows[VOTES + e][:m], experts[e]
            views = views_of(raw[e + 1], kinds[e + 1], start, m)
            weight = expert.weight if expert.mode == KEEP_ALL else F32(1)
            largest = subtract(views, kinds[e + 1], base, weight, votes)
            worst[e + 1] = max(worst[e + 1], largest)
            thin(votes, experts[e : e + 1], first + start, limits[e], factors[e], scratch)
        if elects:
            add_elected(rows, m, experts, normalize, mix[1])
        else:
            add_votes(rows, m, mix[0], mix[1])
        result = max(result, narrow(rows[BASE][:m], out_kind, out, start))
        start += strip
    for s in range(n_experts + 1):
        if worst[s] >= U32(EXPONENT):
            return s
    return n_experts + 1 if result >= U32(EXPONENT) else -1


@loop
def subtract(views: Any, kind: int, base: Floats, weight: np.float32, votes: Floats) -> np.uint32:
    """Write weight * (expert - base); returns the largest magnitude of the expert."""
    largest = U32(0)
    for i in range(votes.size):
        value = value_at(views, kind, i)
        largest = max(largest, size_of(value))
        votes[i] = weight * (value - base[i])
    return largest


@loop
def thin(
    votes: Floats, experts: Any, first: int, below: Any, factors: Floats, scratch: Any
) -> None:
    """Turn elements [first, first + n) of a task vector into votes.

    `below` and `factors` are those of each rank in a row, if the mode is RANK.
    """
    expert, n = experts[0], votes.size
    if expert.mode == TRIM:
        trim(votes, experts, scratch[FLAGS], carray(scratch[PLACES], n + 8, np.uint16))
    elif expert.mode == DRAW:
        halves = random_halves(expert.stream, first, n, scratch[WORDS])
        draw(votes, halves, expert.below, expert.factor, expert.weight)
    elif expert.mode == RANK:
        halves = random_halves(expert.stream, first, n, scratch[WORDS])
        drop_by_rank(votes, halves, below, factors, scratch)
        weigh(votes, expert.weight)
    elif expert.mode == KEEP_NONE:
        fill(votes, F32(0))


@loop
def trim(votes: Floats, experts: Any, flags: Any, places: Halves) -> None:
    """Keep the entries above the threshold and evenly spread entries at it, and weigh them."""
    n, expert = votes.size, experts[0]
    threshold, weight = np.int32(expert.threshold), expert.weight
    tied = carray(flags, n + 8, np.uint8)
    for i in range(n):
        size = np.int32(size_of(votes[i]))
        tied[i] = np.uint8(size == threshold)
        votes[i] = weight * votes[i] if size >= threshold else F32(0)
    if expert.tied:
        for i in range(n, (n + 7) & ~7):
            tied[i] = 0
        experts[0].remainder = drop_ties(
            votes, places[: find(flags, n, places)], expert.wanted, expert.tied, expert.remainder
        )


@loop
def drop_ties(votes: Floats, places: Halves, wanted: int, tied: int, remainder: int) -> int:
    """Keep evenly spread entries of those tied at the threshold, and set the others to zero.

    Of `tied` in the whole tensor of which `wanted` are kept, the j-th is kept when
    floor((j + 1) * wanted / tied) > floor(j * wanted / tied).

    Args:
        votes: (n,), changed.
        places: the tied entries among them, ascending.
        wanted: number of tied entries of the tensor that are kept.
        tied: number of tied entries of the tensor.
        remainder: j * wanted modulo tied before these entries; it is returned as after them.
    """
    for place in places:
        remainder += wanted
        kept = remainder >= tied
        remainder -= tied if kept else 0
        votes[place] = votes[place] if kept else F32(0)
    return remainder


@loop
def draw(votes: Floats, halves: Words, below: int, factor: np.float32, weight: np.float32) -> None:
    """Keep the entries whose random bits are below a limit, rescale and weigh them."""
    last = U32(below - U64(1))  # the limit is not zero
    for i in range(votes.size):
        votes[i] = weight * (factor * (votes[i] if halves[i] <= last else F32(0)))


@loop
def drop_by_rank(votes: Floats, halves: Words, below: Any, factors: Floats, scratch: Any) -> None:
    """Keep entries by their rank within each row, and rescale them; see `thin_row`."""
    row, start = below.size, 0
    keys = carray(scratch[KEYS], (2, row), np.uint64)
    counts = carray(scratch[COUNTS], N_BINS, np.uint32)
    while start < votes.size:
        thin_row(votes[start : start + row], halves[start:], below, factors, keys, counts)
        start += row


@loop
def thin_row(
    values: Floats, halves: Any, below: Any, factors: Floats, keys: Any, counts: Any
) -> None:
    """Keep an entry of a row if its random bits are below the limit of its rank; rescale it.

    The arrays have a row's length n; `keys`, (2, n), and `counts`, (N_BINS,), are scratch.
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
    keys are sorted by all 31. The keys of SHORT rows are sorted by insertion, as no two are equal.

    Returns:
        The row of `keys` that is sorted.
    """
    n = values.size
    for i in range(n):
        keys[0, i] = U64(U64(size_of(values[i])) << U64(32)) | U64(i)
    if n <= SHORT:
        insert_in_order(keys[0])
        return 0
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
def insert_in_order(keys: Any) -> None:
    """Sort a few keys by insertion."""
    for i in range(1, keys.size):
        key, place = keys[i], i
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key


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


@loop
def weigh(votes: Floats, weight: np.float32) -> None:
    """Multiply by a weight."""
    for i in range(votes.size):
        votes[i] = weight * votes[i]


@loop
def random_halves(stream: int, first: int, n: int, words: Any) -> Words:
    """Draw the bits of n elements from `first` on; `words`: address of n // 2 + 2 integers."""
    random_words(stream, first >> 1, carray(words, (n + 3) >> 1, np.uint64))
    halves: Words = carray(words, n + 1, np.uint32)[first & 1 :]
    return halves


@loop
def random_words(stream: int, first: int, words: Any) -> None:
    """Write the words of a stream from word `first` on; see `random_bits`."""
    state = U64(first) * U64(GOLDEN) + stream
    for i in range(words.size):
        state += U64(GOLDEN)
        word = state
        word = (word ^ (word >> U64(30))) * U64(MIX_1)
        word = (word ^ (word >> U64(27))) * U64(MIX_2)
        words[i] = word ^ (word >> U64(31))


@loop
def add_votes(rows: Floats, n: int, divisor: np.float32, scale: np.float32) -> None:
    """Add all votes to the base, as `methods.votes.all_votes` does."""
    base, total = rows[BASE][:n], rows[BALANCE][:n]
    fill(total, F32(0))
    for e in range(VOTES, len(rows)):
        add(rows[e][:n], total)
    for i in range(n):
        base[i] = base[i] + scale * (total[i] / divisor)


@loop
def add_elected(rows: Floats, n: int, experts: Any, normalize: int, scale: np.float32) -> None:
    """Add to the base the votes with the elected sign, as `methods.votes.elected_votes` does."""
    base, balance = rows[BASE][:n], rows[BALANCE][:n]
    mixed, total = rows[MIXED][:n], rows[TOTAL][:n]
    for row in (balance, mixed, total):
        fill(row, F32(0))
    for e in range(len(experts)):
        add(rows[VOTES + e][:n], balance)
    for e in range(len(experts)):
        add_agreeing(rows[VOTES + e][:n], experts[e].weight, balance, mixed, total)
    if not normalize:
        fill(total, F32(1))
    finish(mixed, total, balance, scale, base)


@loop
def fill(values: Floats, value: np.float32) -> None:
    """Set all values."""
    for i in range(values.size):
        values[i] = value


@loop
def add(votes: Floats, total: Floats) -> None:
    """Add votes to a sum."""
    for i in range(votes.size):
        total[i] += votes[i]


@loop
def add_agreeing(
    votes: Floats, weight: np.float32, balance: Floats, mixed: Floats, total: Floats
) -> None:
    """Add the votes with the sign of the balance, and their weight; `finish` handles balance 0."""
    for i in range(votes.size):
        sign = U32(bits_of(balance[i]) & U32(SIGN))
        agrees = float_of(bits_of(votes[i]) ^ sign) > 0
        mixed[i] += votes[i] if agrees else F32(0)
        total[i] += weight if agrees else F32(0)


@loop
def finish(mixed: Floats, total: Floats, balance: Floats, scale: np.float32, base: Floats) -> None:
    """Add scale * mixed / total to the base, where the balance is not zero."""
    for i in range(base.size):
        is_decided = balance[i] != 0
        vote = mixed[i] if is_decided else F32(0)
        divisor = total[i] if is_decided and total[i] != 0 else F32(1)
        base[i] = base[i] + scale * (vote / divisor)


@loop
def add_weighted(views: Any, kind: int, weight: np.float32, total: Floats) -> np.uint32:
    """Add weight * source; returns the largest magnitude of the source."""
    largest = U32(0)
    for i in range(total.size):
        value = value_at(views, kind, i)
        largest = max(largest, size_of(value))
        total[i] += weight * value
    return largest


@entry(ADDRESSES, INTEGERS, INTEGER, INTEGER, INTEGER, ADDRESS, INTEGER, ADDRESS, ADDRESSES)
def average(  # noqa: PLR0913
    raw: Any,
    kinds: Any,
    n: int,
    n_sources: int,
    strip: int,
    out: Any,
    out_kind: int,
    weights: Any,
    scratch: Any,
) -> int:
    """Average one piece of several models; the divisor follows their weights."""
    weights = carray(weights, n_sources + 1, np.float32)
    sums = carray(scratch[0], strip, np.float32)
    worst, result = carray(scratch[1], n_sources, np.uint32), U32(0)
    start = 0
    while start < n:  # a range of unknown step would raise
        m = min(strip, n - start)
        total = sums[:m]
        fill(total, F32(0))
        for s in range(n_sources):
            views = views_of(raw[s], kinds[s], start, m)
            largest = add_weighted(views, kinds[s], weights[s], total)
            worst[s] = max(worst[s], largest)
        for i in range(m):
            total[i] = total[i] / weights[n_sources]
        result = max(result, narrow(total, out_kind, out, start))
        start += strip
    for s in range(n_sources):
        if worst[s] >= U32(EXPONENT):
            return s
    return n_sources if result >= U32(EXPONENT) else -1
