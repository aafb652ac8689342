"""The hot loop of 8-bit floats: a piece of a matrix times the scales of its blocks.

Every element is one product, by itself, so that its bits depend on nothing but its place.
"""

from __future__ import annotations

from typing import Any

from lewis_hub.merge.bits import compiled


@compiled
def multiply_blocks(  # noqa: PLR0913
    values: Any,
    first: int,
    n_columns: int,
    n_rows_a_block: int,
    n_columns_a_block: int,
    scales: Any,
) -> None:
    """Multiply a piece of a matrix by the scales of the blocks that it lies in.

    Args:
        values: (n,) float32: elements [first, first + n) of the matrix, row by row; changed.
        first: the piece's first element.
        n_columns: of the matrix.
        n_rows_a_block: the last block may have fewer.
        n_columns_a_block: likewise.
        scales: (blocks down, blocks across) float32.
    """
    done = 0
    while done < values.size:
        row, column = (first + done) // n_columns, (first + done) % n_columns
        across = column // n_columns_a_block
        stop = min((across + 1) * n_columns_a_block, n_columns)
        scale = scales[row // n_rows_a_block, across]
        end = min(done + stop - column, values.size)
        for i in range(done, end):
            values[i] = values[i] * scale
        done = end
