"""The hot loop of quantised matrices: a piece of one, each value times the scale of its block.

Every element is one difference and one product, by itself, so that its bits depend on nothing but
its place.
"""

from __future__ import annotations

from typing import Any

from lewis_hub.merge.bits import compiled
from lewis_hub.merge.operands import Decoding


@compiled
def scale_up(codes: Any, first: int, decoding: Decoding, values: Any) -> None:
    """Read a piece of a matrix of codes as float32.

    Args:
        codes: (n,) uint8: elements [first, first + n) of the matrix, row by row.
        first: the piece's first element.
        decoding: of the matrix.
        values: (n,) float32, written.
    """
    table, groups = decoding.table, decoding.groups
    done = 0
    while done < codes.size:
        row, column = (first + done) // groups.size, (first + done) % groups.size
        end = min(done + groups.size - column, codes.size)
        scales = decoding.scales[row // decoding.n_rows]
        zeros = decoding.zeros[row // decoding.n_rows]
        for i in range(done, end):
            group = groups[column + i - done]
            values[i] = (table[codes[i]] - zeros[group]) * scales[group]
        done = end
