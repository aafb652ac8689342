"""The loop of 8-bit floats: a piece of a matrix, each value times the scale of its block.

Every element is one product, by itself, so that its bits depend on nothing but its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lewis_hub.merge.lanes import BYTE, F32, U64, Code
from lewis_hub.merge.native import Native, address_of, compiled

SCALE_UP = ("n", "first", "columns", "block_rows", "block_columns", "raw", "table", "scales")


def scale_up(  # noqa: PLR0913
    raw: Any, table: Any, first: int, lengths: Any, scales: Any, values: Any
) -> None:
    """Read a piece of a matrix of 8-bit floats as float32.

    Args:
        raw: (n,) uint8: elements [first, first + n) of the matrix, row by row.
        table: (256,) float32: what each pattern stands for.
        first: the piece's first element.
        lengths: columns of the matrix, rows of a block, columns of a block; the last blocks may
            be smaller.
        scales: (blocks down, blocks across) float32.
        values: (n,) float32, written.
    """
    numbers = (raw.size, first, *(int(length) for length in lengths))
    _scaling()(*numbers, *(address_of(array) for array in (raw, table, scales, values)))


@cache
def _scaling() -> Native:
    def write(code: Code) -> None:
        given = code.arguments
        n, columns = given["n"], given["columns"]
        n_across = (columns + given["block_columns"] - 1) / given["block_columns"]
        done = code.variable(code.number(0))
        with code.repeating() as leave:
            leave(done.value >= n)
            place = given["first"] + done.value
            row, column = place / columns, place % columns
            down, across = row / given["block_rows"], column / given["block_columns"]
            scale = code.load(given["scales"] + (down * n_across + across) * 4, F32)
            stop = ((across + 1) * given["block_columns"]).smallest(columns)
            end = (done.value + stop - column).smallest(n)
            with code.counting(done.value, end) as i:
                pattern = code.load(given["raw"] + i, BYTE).widened(U64)
                value = code.load(given["table"] + pattern * 4, F32)
                code.store(value * scale, given["values"] + i * 4)
            done.set(end)
        code.give_back(code.number(0))

    return compiled("scale_up", (*SCALE_UP, "values"), write)
