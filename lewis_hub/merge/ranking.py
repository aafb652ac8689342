"""The ranks of a row's magnitudes, and what is kept by them: what DELLA needs.

Magnitudes are sorted by their 31 bits, ten or eleven at a time from the lowest (a radix sort), so
that equal ones keep the order of their indices.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lewis_hub.merge.bits import magnitude
from lewis_hub.merge.drawing import RandomHalves
from lewis_hub.merge.lanes import F32, U32, U64, Code, Value
from lewis_hub.merge.native import Native, address_of, addresses_of, compiled
from lewis_hub.merge.operands import LANES, RANK, Experts, Piece
from lewis_hub.merge.strips import sources_at, strips

DIGIT_BITS, N_DIGITS = 10, 3  # the last one has a bit more
N_VALUES = 1 << 11  # of the last digit; the others have half as many
COUNTS_BYTES = 4 * N_VALUES
NOTHING = np.empty(0, np.float32)
THIN = ("n", "row", "first", "stream", "below", "factors", "keys", "halves", "values")


def thinned(piece: Piece, experts: Experts, e: int) -> npt.NDArray[np.float32]:
    """What is left of a piece of a task vector; nothing where ranks don't decide.

    Args:
        piece: whole rows of `piece.block` elements.
        experts: with the random stream, and what each rank allows.
        e: number of the expert.
    """
    if experts.modes[e] != RANK:
        return NOTHING
    kinds = (int(piece.kinds[0]), int(piece.kinds[e + 1]))
    values = np.empty(piece.n + LANES, np.float32)
    raw = addresses_of((piece.raw[0], piece.raw[e + 1]))
    _subtracting(kinds)(piece.n, address_of(raw), address_of(values))
    keys = np.empty((2, piece.block), np.uint64)
    halves = np.empty(piece.block + 2 * LANES, np.uint32)
    tables = (experts.table.below[e], experts.table.factors[e], keys, halves, values)
    numbers = (piece.n, piece.block, piece.first, int(experts.streams[e]))
    _thinning()(*numbers, *(address_of(array) for array in tables))
    return values


@cache
def _subtracting(kinds: tuple[int, int]) -> Native:
    def write(code: Code) -> None:
        with strips(sources_at(code, kinds)) as strip:
            delta = strip.read(1) - strip.read(0)
            code.store(delta, code.arguments["values"] + strip.first * 4)
        code.give_back(code.number(0))

    return compiled("subtract", ("n", "raw", "values"), write)


@cache
def _thinning() -> Native:
    def write(code: Code) -> None:
        given, zero = code.arguments, code.number(0)
        with code.counting(zero, given["n"], given["row"]) as start:
            values = given["values"] + start * 4
            _draw(code, given["first"] + start)
            ordered = _sort(code, values)
            _thin(code, values, ordered, (given["first"] + start) % 2)
        code.give_back(zero)

    return compiled("thin", THIN, write)


def _draw(code: Code, first: Value) -> None:
    """The random bits of a row, from the word on that its first element has a half of."""
    given = code.arguments
    halves = RandomHalves(code, given["stream"], first)
    with code.counting(code.number(0), given["row"] + 1, LANES) as i:
        code.store(halves.draw(), given["halves"] + i * 4)


def _sort(code: Code, values: Value) -> Value:
    """Order a row by magnitude; where its keys lie then. Their low halves are the places."""
    row, zero = code.arguments["row"], code.number(0)
    source = code.variable(code.arguments["keys"])
    target = code.variable(code.arguments["keys"] + row * 8)
    counts = code.room(N_DIGITS * COUNTS_BYTES)
    with code.counting(zero, code.number(N_DIGITS * COUNTS_BYTES), 4 * LANES) as i:
        code.store(code.many(0, U32), counts + i)
    with code.counting(zero, row) as i:
        size = magnitude(code.load(values + i * 4, F32)).widened(U64)
        code.store((size << 32) | i, source.value + i * 8)
        for which in range(N_DIGITS):
            _count(code, counts + which * COUNTS_BYTES + _digit(size, which) * 4)
    for which in range(N_DIGITS):
        own = counts + which * COUNTS_BYTES
        first = code.load(source.value, U64) >> 32
        alike = code.load(own + _digit(first, which) * 4, U32).widened(U64)
        with code.when(alike.differs(row)):
            _accumulate(code, own)
            with code.counting(zero, row) as i:
                key = code.load(source.value + i * 8, U64)
                place = _count(code, own + _digit(key >> 32, which) * 4)
                code.store(key, target.value + place.widened(U64) * 8)
            before = source.value
            source.set(target.value)
            target.set(before)
    return source.value


def _digit(size: Value, which: int) -> Value:
    digit = size >> (DIGIT_BITS * which)
    return digit if which == N_DIGITS - 1 else digit & ((1 << DIGIT_BITS) - 1)


def _count(code: Code, address: Value) -> Value:
    """Add one to a number; what it was before."""
    before = code.load(address, U32)
    code.store(before + 1, address)
    return before


def _accumulate(code: Code, counts: Value) -> None:
    """Replace each count by the sum of those before it."""
    total = code.variable(code.number(0, U32))
    with code.counting(code.number(0), code.number(N_VALUES)) as i:
        here = code.load(counts + i * 4, U32)
        code.store(total.value, counts + i * 4)
        total.set(total.value + here)


def _thin(code: Code, values: Value, ordered: Value, odd: Value) -> None:
    """Keep an entry of a row if its random bits are below what its rank allows, and rescale it."""
    given = code.arguments
    with code.counting(code.number(0), given["row"]) as rank:
        place = code.load(ordered + rank * 8, U64) & 0xFFFFFFFF
        half = code.load(given["halves"] + (place + odd) * 4, U32).widened(U64)
        below = code.load(given["below"] + rank * 8, U64)
        value = code.load(values + place * 4, F32)
        factor = code.load(given["factors"] + rank * 4, F32)
        # all bits or none: a branch would be guessed wrong half the time
        code.store((value * factor).where(half < below), values + place * 4)
