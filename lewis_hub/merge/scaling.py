"""The loop of quantised matrices: a piece of one, each value times the scale of its block.

Every element is one difference and one product, by itself, so that its bits depend on nothing but
its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lewis_hub.merge.lanes import BYTE, F32, U32, U64
from lewis_hub.merge.loops import Code
from lewis_hub.merge.native import Native, address_of, compiled
from lewis_hub.merge.operands import Decoding

NUMBERS = ("n", "first", "columns", "block_rows", "across")
ARRAYS = ("codes", "table", "groups", "scales", "zeros", "values")


def scale_up(codes: Any, first: int, decoding: Decoding, values: Any) -> None:
    """Read a piece of a matrix of codes as float32.

    Args:
        codes: (n,) uint8: elements [first, first + n) of the matrix, row by row.
        first: the piece's first element.
        decoding: of the matrix.
        values: (n,) float32, written.
    """
    table, n_rows, groups, scales, zeros = decoding
    numbers = (codes.size, first, groups.size, n_rows, scales.shape[1])
    arrays = (codes, table, groups, scales, zeros, values)
    _scaling()(*numbers, *(address_of(array) for array in arrays))


@cache
def _scaling() -> Native:
    def write(code: Code) -> None:
        given = code.arguments
        done = code.variable(code.number(0))
        with code.repeating() as leave:  # row by row, or what of it belongs to the piece
            leave(done.value >= given["n"])
            place = given["first"] + done.value
            row, column = place / given["columns"], place % given["columns"]
            end = (done.value + given["columns"] - column).smallest(given["n"])
            down = row / given["block_rows"] * given["across"]
            with code.counting(done.value, end) as i:
                at = column + i - done.value
                group = down + code.load(given["groups"] + at * 4, U32).widened(U64)
                stands_for = code.load(given["codes"] + i, BYTE).widened(U64)
                value = code.load(given["table"] + stands_for * 4, F32)
                zero = code.load(given["zeros"] + group * 4, F32)
                scale = code.load(given["scales"] + group * 4, F32)
                code.store((value - zero) * scale, given["values"] + i * 4)
            done.set(end)
        code.give_back(code.number(0))

    return compiled("scale_up", (*NUMBERS, *ARRAYS), write)
