"""A piece of a tensor, LANES elements of all sources at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lewis_hub.merge.bits import EXPONENT, magnitude, narrow, widen, width
from lewis_hub.merge.lanes import F32, U32, U64, Value, Variable
from lewis_hub.merge.loops import Code
from lewis_hub.merge.operands import LANES

TAIL_BYTES = 4 * LANES
AHEAD = 1024  # elements: processors fetch ahead themselves, and stop where a page of memory ends


@dataclass(frozen=True)
class Sources:
    """The bytes of several sources.

    Attributes:
        kinds: their formats.
        n: elements of each.
        n_whole: of them in strips that are full.
        starts: where their bytes begin.
        tails: where a copy of the last strip begins, filled up with zeros.
        largest: magnitude of what was read, lane by lane.
    """

    code: Code
    kinds: Sequence[int]
    n: Value
    n_whole: Value
    starts: Sequence[Value]
    tails: Sequence[Value]
    largest: Sequence[Variable]


@dataclass(frozen=True)
class Strip:
    """LANES elements, or fewer at the end.

    Attributes:
        first: number of the first element.
        valid: which lanes hold an element; what is read into the others is zero.
        soon: number of an element that is needed soon; there may be none.
    """

    sources: Sources
    first: Value
    valid: Value
    soon: Value

    def read(self, source: int) -> Value:
        """The elements of a source as float32; what is not finite is remembered."""
        own, kind = self.sources, self.sources.kinds[source]
        place = own.starts[source] + self.first * width(kind)
        address = place.where(self.first < own.n_whole, own.tails[source])
        own.code.fetch_ahead(own.starts[source] + self.soon * width(kind))
        value = widen(own.code, address, kind)
        seen = own.largest[source]
        seen.set(seen.value.largest(magnitude(value)))
        return value


def sources_at(code: Code, kinds: Sequence[int]) -> Sources:
    """As many sources as formats: the arguments `raw`, where their addresses lie, and `n`."""
    n, raw = code.arguments["n"], code.arguments["raw"]
    starts = [code.load(raw + 8 * i, U64) for i in range(len(kinds))]
    whole = n - n % LANES
    tails = []
    for start, kind in zip(starts, kinds, strict=True):
        tail = code.room(TAIL_BYTES)
        code.store(code.many(0, U32), tail)
        code.copy(start + whole * width(kind), tail, (n - whole) * width(kind))
        tails.append(tail)
    largest = [code.variable(code.many(0, U32)) for _ in kinds]
    return Sources(code, kinds, n, whole, starts, tails, largest)


@contextmanager
def strips(sources: Sources) -> Iterator[Strip]:
    """Run for each strip."""
    code = sources.code
    places = code.many(list(range(LANES)), U32)
    with code.counting(code.number(0), sources.n, LANES) as first:
        left = (sources.n - first).narrowed(U32).everywhere()
        yield Strip(sources, first, places < left, first + AHEAD)


def make_strips(sources: Sources, kind: int, make: Callable[[Strip], Value]) -> None:
    """Make a piece strip by strip, and end the function.

    It gives back the number of the first source that held NaN or infinity, that of sources if only
    the result does, else -1.

    Args:
        sources: what it is made of.
        kind: the format of the result, which goes to the argument `out`: it has room for whole
            strips.
        make: makes a strip of it, as float32.
    """
    code = sources.code
    result = code.variable(code.many(0, U32))
    with strips(sources) as strip:
        place = code.arguments["out"] + strip.first * width(kind)
        found = narrow(code, make(strip), kind, place)
        result.set(result.value.largest(found))
    code.give_back(fault_of(code, [*sources.largest, result]))


def fault_of(code: Code, largest: Sequence[Variable]) -> Value:
    """The number of the first of which a lane is not finite, or -1."""
    fault = code.variable(code.number(-1))
    for number, seen in reversed(list(enumerate(largest))):
        is_odd = (seen.value >= EXPONENT).packed.differs(0)
        fault.set(code.number(number).where(is_odd, fault.value))
    return fault.value


def number_of(code: Code, name: str, place: int) -> Value:
    """A float32 of the array that an argument names, in all lanes."""
    return code.load(code.arguments[name] + 4 * place, F32).everywhere()
