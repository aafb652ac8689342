"""The ranks of a row's magnitudes, and what is kept by them: what DELLA needs.

Magnitudes are sorted by their high 24 bits, twelve at a time from the lower ones (a radix sort), so
that equal ones keep the order of their indices. Task vectors of 16-bit floats hardly ever need the
other seven; where they do, all 31 are sorted by.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lewis_hub.merge.bits import magnitude
from lewis_hub.merge.drawing import RandomHalves
from lewis_hub.merge.lanes import BIT, F32, U32, U64, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.native import Native, address_of, addresses_of, compiled
from lewis_hub.merge.operands import LANES, RANK, Experts, Piece
from lewis_hub.merge.strips import sources_at, strips

DIGITS = (LOW, MIDDLE, HIGH) = (0, 9), (9, 11), (20, 11)  # first bit of a magnitude, bits
COUNTS_BYTES = 4 << 11
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
    row, keys = code.arguments["row"], code.arguments["keys"]
    beside = keys + row * 8
    middle, high = _cleared(code), _cleared(code)
    with code.counting(code.number(0), row) as i:
        key = (magnitude(code.load(values + i * 4, F32)).widened(U64) << 32) | i
        code.store(key, keys + i * 8)
        _count(code, middle, key, MIDDLE)
        _count(code, high, key, HIGH)
    _scatter(code, keys, beside, middle, MIDDLE)
    _scatter(code, beside, keys, high, HIGH)
    ordered = code.variable(keys)
    with code.when(_is_out_of_order(code, keys)):
        places = (keys, beside, keys, beside)
        for digit, source, target in zip(DIGITS, places, places[1:], strict=False):
            counts = _cleared(code)
            with code.counting(code.number(0), row) as i:
                _count(code, counts, code.load(source + i * 8, U64), digit)
            _scatter(code, source, target, counts, digit)
        ordered.set(beside)
    return ordered.value


def _cleared(code: Code) -> Value:
    counts = code.room(COUNTS_BYTES)
    with code.counting(code.number(0), code.number(COUNTS_BYTES), 4 * LANES) as i:
        code.store(code.many(0, U32), counts + i)
    return counts


def _count(code: Code, counts: Value, key: Value, digit: tuple[int, int]) -> Value:
    """Count a key at its digit; how many there were before."""
    first, n_bits = digit
    place = counts + ((key >> (32 + first)) & ((1 << n_bits) - 1)) * 4
    before = code.load(place, U32)
    code.store(before + 1, place)
    return before.widened(U64)


def _scatter(
    code: Code, source: Value, target: Value, counts: Value, digit: tuple[int, int]
) -> None:
    """Order keys by a digit that was counted."""
    _accumulate(code, counts, 1 << digit[1])
    with code.counting(code.number(0), code.arguments["row"]) as i:
        key = code.load(source + i * 8, U64)
        code.store(key, target + _count(code, counts, key, digit) * 8)


def _is_out_of_order(code: Code, keys: Value) -> Value:
    """Whether a key is larger than the next."""
    found = code.variable(code.number(0, BIT))
    with code.counting(code.number(1), code.arguments["row"]) as i:
        before, key = code.load(keys + i * 8 - 8, U64), code.load(keys + i * 8, U64)
        found.set(found.value | (before > key))
    return found.value


def _accumulate(code: Code, counts: Value, n: int) -> None:
    """Replace each of n counts by the sum of those before it."""
    total = code.variable(code.many(0, U32))
    with code.counting(code.number(0), code.number(4 * n), 4 * LANES) as i:
        here = code.load(counts + i, U32, LANES)
        sums = here
        for distance in (1, 2, 4, 8):
            sums += sums.moved_up(distance)
        code.store(total.value + (sums - here), counts + i)
        total.set(total.value + sums.last_everywhere)


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
