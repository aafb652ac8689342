"""Random bits in lanes: those that `random_bits` draws."""

from __future__ import annotations

from lewis_hub.merge.lanes import U32, U64, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.operands import LANES
from lewis_hub.methods.random_bits import GOLDEN, MIX_1, MIX_2

WORDS = LANES // 2  # a word serves two elements


class RandomHalves:
    """A stream, drawn from strip by strip.

    Args:
        code: draws in a loop that begins after this.
        stream: its number.
        first: the first element of the first strip; even.
    """

    def __init__(self, code: Code, stream: Value, first: Value) -> None:
        self._code = code
        counts = code.many(list(range(1, WORDS + 1)), U64) + (first >> 1).everywhere(WORDS)
        self._words = code.variable(counts * GOLDEN + stream.everywhere(WORDS))

    def draw(self) -> Value:
        """32 bits for each element of the next strip."""
        word = self._words.value
        self._words.set(word + (WORDS * GOLDEN) % (1 << 64))
        word = (word ^ (word >> 30)) * MIX_1
        word = (word ^ (word >> 27)) * MIX_2
        return (word ^ (word >> 31)).regrouped(U32, LANES)
