"""The loops that look for a threshold: what the magnitudes of task vectors are.

A magnitude is the 31 bits of a float32 without its sign; their order is that of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lewis_hub.merge.bits import magnitude
from lewis_hub.merge.lanes import BIT, U32, U64, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.native import Native, address_of, addresses_of, compiled
from lewis_hub.merge.operands import (
    ABOVE,
    AT_HIGH,
    AT_LOW,
    INSIDE,
    LANES,
    LOW_BITS,
    LOW_MASK,
    Piece,
)
from lewis_hub.merge.strips import Strip, sources_at, strips

TALLY_BYTES = 4 * 8
PLACES_AHEAD = 8  # of a sample: memory is fetched for


def sample(piece: Piece, places: Any, found: Any) -> None:
    """Write the magnitudes of each expert's task vector at some places, LANES from each on.

    Args:
        piece: of all sources; of at least LANES elements.
        places: (n_places,) int64: of elements within the piece, at most n - LANES.
        found: one an expert: (n_places, LANES) uint32, written.
    """
    run = _sample(tuple(piece.kinds.tolist()))
    arrays = addresses_of(piece.raw), places, addresses_of(found)
    run(piece.n, len(places), *(address_of(array) for array in arrays))


def sort_out(piece: Piece, chosen: tuple[int, ...], ends: Any, tally: Any, inside: Any) -> None:
    """Count the magnitudes above a bracket and on its ends, and collect those inside it.

    Args:
        piece: of all sources.
        chosen: numbers of the experts that are looked at.
        ends: (2, n_experts) uint32: the lower and the upper end of each bracket.
        tally: (n_experts, 4) int64, added to: above, at high, at low, inside.
        inside: (n_experts, room + LANES) uint32, filled as far as the tally's last column says;
            where that reaches `room`, some found none.
    """
    run = _sort_out(tuple(piece.kinds.tolist()), chosen)
    arrays = addresses_of(piece.raw), ends[0], ends[1], tally, addresses_of(inside)
    run(piece.n, inside.shape[1] - LANES, *(address_of(array) for array in arrays))


def count_high(piece: Piece, chosen: tuple[int, ...], counts: Any) -> None:
    """Count the magnitudes of task vectors by their high 16 bits.

    Args:
        piece: of all sources.
        chosen: numbers of the experts that are looked at.
        counts: (n_experts, HIGH_BINS) uint32, added to.
    """
    run = _count_high(tuple(piece.kinds.tolist()), chosen)
    arrays = addresses_of(piece.raw), addresses_of(counts)
    run(piece.n, *(address_of(array) for array in arrays))


def count_low(piece: Piece, chosen: tuple[int, ...], high: Any, counts: Any) -> None:
    """Count, among magnitudes with certain high bits, by the low 15 bits.

    Args:
        piece: of all sources.
        chosen: numbers of the experts that are looked at.
        high: (n_experts,) uint32: the high bits.
        counts: (n_experts, LOW_BINS) uint32, added to.
    """
    run = _count_low(tuple(piece.kinds.tolist()), chosen)
    arrays = addresses_of(piece.raw), high, addresses_of(counts)
    run(piece.n, *(address_of(array) for array in arrays))


@cache
def _sample(kinds: tuple[int, ...]) -> Native:
    def write(code: Code) -> None:
        experts = range(len(kinds) - 1)
        found = [_address(code, "found", e) for e in experts]
        sources, everywhere = sources_at(code, kinds), code.many(1, BIT)
        last = code.arguments["n_places"] - 1
        with code.counting(code.number(0), code.arguments["n_places"]) as i:
            first, soon = (
                code.load(code.arguments["places"] + (i + later).smallest(last) * 8, U64)
                for later in (0, PLACES_AHEAD)
            )
            strip = Strip(sources, first, everywhere, soon)
            for e, size in enumerate(_sizes(strip, experts)):
                code.store(size, found[e] + i * (4 * LANES))
        code.give_back(code.number(0))

    return compiled("sample", ("n", "n_places", "raw", "places", "found"), write)


@cache
def _sort_out(kinds: tuple[int, ...], chosen: tuple[int, ...]) -> Native:
    def write(code: Code) -> None:
        brackets = [_Bracket(code, e) for e in chosen]
        with strips(sources_at(code, kinds)) as strip:
            for size, bracket in zip(_sizes(strip, chosen), brackets, strict=True):
                bracket.look_at(size, strip)
        for bracket in brackets:
            bracket.tell()
        code.give_back(code.number(0))

    return compiled("sort_out", ("n", "room", "raw", "low", "high", "tally", "inside"), write)


@cache
def _count_high(kinds: tuple[int, ...], chosen: tuple[int, ...]) -> Native:
    def write(code: Code) -> None:
        bins = [_address(code, "counts", e) for e in chosen]
        _each(code, kinds, chosen, lambda size, place: _count(code, bins[place], size >> LOW_BITS))
        code.give_back(code.number(0))

    return compiled("count_high", ("n", "raw", "counts"), write)


@cache
def _count_low(kinds: tuple[int, ...], chosen: tuple[int, ...]) -> Native:
    def write(code: Code) -> None:
        bins = [_address(code, "counts", e) for e in chosen]
        high = [code.load(code.arguments["high"] + 4 * e, U32) for e in chosen]

        def look_at(size: Value, place: int) -> None:
            with code.when((size >> LOW_BITS).equals(high[place])):
                _count(code, bins[place], size & LOW_MASK)

        _each(code, kinds, chosen, look_at)
        code.give_back(code.number(0))

    return compiled("count_low", ("n", "raw", "high", "counts"), write)


class _Bracket:
    """What is found of one expert."""

    def __init__(self, code: Code, e: int) -> None:
        self._code = code
        self._low = code.load(code.arguments["low"] + 4 * e, U32).everywhere()
        self._high = code.load(code.arguments["high"] + 4 * e, U32).everywhere()
        self._tally = code.arguments["tally"] + TALLY_BYTES * e
        self._inside = _address(code, "inside", e)
        self._n_inside = code.variable(code.load(self._tally + 8 * INSIDE, U64))
        self._counts = {at: code.variable(code.many(0, U32)) for at in (ABOVE, AT_HIGH, AT_LOW)}
        self._held = code.room(4 * LANES)

    def look_at(self, size: Value, strip: Strip) -> None:
        """Sort out a strip."""
        self._add(ABOVE, size > self._high)
        self._add(AT_HIGH, size.equals(self._high) & strip.valid)
        self._add(AT_LOW, size.equals(self._low) & strip.valid)
        self._collect(size, (size > self._low) & (size < self._high))

    def tell(self) -> None:
        """Add what was counted to the tally."""
        code = self._code
        for at, count in self._counts.items():
            code.store(count.value, self._held)
            with code.counting(code.number(0), code.number(4 * LANES), 4) as i:
                found = code.load(self._held + i, U32).widened(U64)
                place = self._tally + 8 * at
                code.store(code.load(place, U64) + found, place)
        code.store(self._n_inside.value, self._tally + 8 * INSIDE)

    def _add(self, at: int, hits: Value) -> None:
        count = self._counts[at]
        count.set(count.value + hits.widened(U32))

    def _collect(self, size: Value, hits: Value) -> None:
        code, n_inside, room = self._code, self._n_inside, self._code.arguments["room"]
        packed = hits.packed
        with code.when(packed.differs(0)):
            code.store_chosen(size, hits, self._inside + n_inside.value * 4)
            n_found = n_inside.value + packed.n_bits.widened(U64)
            n_inside.set(n_found.smallest(room))


def _sizes(strip: Strip, chosen: Sequence[int]) -> list[Value]:
    """The magnitudes of the chosen experts' task vectors in a strip."""
    base = strip.read(0)
    return [magnitude(strip.read(e + 1) - base) for e in chosen]


def _each(
    code: Code,
    kinds: tuple[int, ...],
    chosen: tuple[int, ...],
    look_at: Callable[[Value, int], None],
) -> None:
    """Look at the magnitudes one by one; beside each, the place of its expert in `chosen`."""
    held = code.room(4 * LANES)
    with strips(sources_at(code, kinds)) as strip:
        for place, size in enumerate(_sizes(strip, chosen)):
            code.store(size, held)
            left = code.arguments["n"] - strip.first
            n = left.where(left < LANES, code.number(LANES))
            with code.counting(code.number(0), n) as i:
                look_at(code.load(held + i * 4, U32), place)


def _count(code: Code, bins: Value, which: Value) -> None:
    place = bins + which.widened(U64) * 4
    code.store(code.load(place, U32) + 1, place)


def _address(code: Code, name: str, place: int) -> Value:
    return code.load(code.arguments[name] + 8 * place, U64)
