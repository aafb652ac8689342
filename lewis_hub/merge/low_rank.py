"""The loop of LoRA adapters: a piece of W + scale · left @ right.

Every element is summed over the rank in order, by itself: however a tensor is cut into pieces, and
on whichever machine, the bits are the same. A BLAS promises neither.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from lewis_hub.merge.lanes import F32, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.native import Native, address_of, compiled
from lewis_hub.merge.operands import LANES

TOGETHER = 4  # strips of a row whose sums stay in registers
ADD = ("n", "first", "columns", "rank", "values", "left", "right", "scale")


def add_low_rank(values: Any, first: int, left: Any, right: Any, scale: Any) -> None:
    """Add scale · left @ right to a piece of a matrix.

    Args:
        values: (n,) float32: elements [first, first + n) of the matrix, row by row; added to.
        first: the piece's first element.
        left: (rows, rank) float32.
        right: (rank, columns) float32.
        scale: float32.
    """
    rank, n_columns = right.shape
    arrays = (values, left, right, np.array([scale], np.float32))
    numbers = (values.size, first, n_columns, rank)
    _adding()(*numbers, *(address_of(array) for array in arrays))


@cache
def _adding() -> Native:
    def write(code: Code) -> None:
        given = code.arguments
        n, columns = given["n"], given["columns"]
        scale = code.load(given["scale"], F32)
        done = code.variable(code.number(0))
        with code.repeating() as leave:  # row by row, or what of it belongs to the piece
            leave(done.value >= n)
            place = given["first"] + done.value
            row, column = place / columns, code.variable(place % columns)
            left = given["left"] + row * given["rank"] * 4
            stop = columns.smallest(column.value + (n - done.value))
            values = given["values"] + (done.value - column.value) * 4
            done.set(done.value + stop - column.value)
            for n_strips in (TOGETHER, 1, 0):
                step = max(n_strips * LANES, 1)
                with code.repeating() as end:
                    end(column.value + step > stop)
                    _add_strips(code, n_strips, column.value, left, values, scale)
                    column.set(column.value + step)
        code.give_back(code.number(0))

    return compiled("add_low_rank", ADD, write)


def _add_strips(  # noqa: PLR0913
    code: Code, n_strips: int, column: Value, left: Value, values: Value, scale: Value
) -> None:
    """Work on neighbouring strips of a row; n_strips is 0: on one element."""
    given, n = code.arguments, LANES if n_strips else 0
    at = [column * 4 + i * 4 * LANES for i in range(max(n_strips, 1))]

    def spread(value: Value) -> Value:
        return value.everywhere() if n else value

    sums = [code.variable(code.many(0.0, F32) if n else code.number(0, F32)) for _ in at]
    with code.counting(code.number(0), given["rank"]) as k:
        factor = spread(code.load(left + k * 4, F32))
        right = given["right"] + k * given["columns"] * 4
        for total, place in zip(sums, at, strict=True):
            total.set(total.value + factor * code.load(right + place, F32, n))
    for total, place in zip(sums, at, strict=True):
        before = code.load(values + place, F32, n)
        code.store(before + spread(scale) * total.value, values + place)
