"""Which of tied entries are kept: evenly spread ones, in the order of the tensor.

Of c that are tied and q that are wanted, the j-th is kept when j * q / c passes a whole number. Its
remainder is carried on from entry to entry: it is below q just after that happened.
"""

from __future__ import annotations

from lewis_hub.merge.lanes import U32, U64, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.operands import LANES


class Turns:
    """The tied entries of one expert.

    Args:
        address: of how many are wanted, how many are tied, and the remainder so far, which is
            written back; fewer than 2**32 are tied.
    """

    def __init__(self, code: Code, address: Value) -> None:
        self._code, self._address = code, address
        wanted, self._tied = (code.load(address + 8 * i, U64).narrowed(U32) for i in range(2))
        self._wanted = wanted.everywhere()
        self._remainder = code.variable(code.load(address + 16, U64).narrowed(U32))
        self._steps = code.room(4 * LANES)  # by how much the next entries move the remainder
        moved = code.variable(code.number(0, U32))
        with code.counting(code.number(0), code.number(4 * LANES), 4) as place:
            moved.set(_sum(moved.value, wanted, self._tied))
            code.store(moved.value, self._steps + place)
        self._all_steps = code.load(self._steps, U32, LANES)

    def taken(self, places: Value) -> Value:
        """Those bits of `places`, which has one for each tied entry of a strip, that are kept."""
        code, before = self._code, self._remainder.value
        after = _sum(self._all_steps, before.everywhere(), self._tied.everywhere())
        last = code.load(self._steps + (places.n_bits - 1).widened(U64) * 4, U32)
        remainder = _sum(last, before, self._tied)
        self._remainder.set(remainder)
        code.store(remainder.widened(U64), self._address + 16)
        return code.deposited((after < self._wanted).packed, places)


def _sum(first: Value, second: Value, limit: Value) -> Value:
    """Of two numbers below a limit the sum, less the limit where it reaches that."""
    missing = limit - second
    beyond = first - missing
    return beyond.where(first >= missing, beyond + limit)
