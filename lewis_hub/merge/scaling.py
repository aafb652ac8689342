"""The hot loop of 8-bit floats: a piece of a matrix, each value times the scale of its block.

Every element is one product, by itself, so that its bits depend on nothing but its place.
"""

from __future__ import annotations

from typing import Any

from lewis_hub.merge.bits import compiled


@compiled
def scale_up(raw: Any, table: Any, first: int, lengths: Any, scales: Any, values: Any) -> None:
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
    n_columns, n_rows_a_block, n_columns_a_block = lengths
    done = 0
    while done < raw.size:
        row, column = (first + done) // n_columns, (first + done) % n_columns
        across = column // n_columns_a_block
        stop = min((across + 1) * n_columns_a_block, n_columns)
        scale = scales[row // n_rows_a_block, across]
        end = min(done + stop - column, raw.size)
        for i in range(done, end):
            values[i] = table[raw[i]] * scale
        done = end
