"""The hot loops of LoRA adapters: a piece of W + scale · left @ right, from raw bytes.

Every element is summed over the rank in order, by itself: however a tensor is cut into pieces, and
on whichever machine, the bits are the same. A BLAS promises neither.

numba's cache on disk notices a change of this file only, not of `bits.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lewis_hub.merge.bits import compiled, widen

CHUNK = 2048  # elements of a row whose sums stay in the first-level cache


@compiled
def widened(raw: Any, kind: int, out: Any) -> None:
    """Read raw bytes of a format of `bits` as float32; `out` says how many elements."""
    widen(raw, kind, 0, out.size, out)


@compiled
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
    sums = np.empty(CHUNK, np.float32)
    done = 0
    while done < values.size:
        row, column = (first + done) // n_columns, (first + done) % n_columns
        n = min(CHUNK, n_columns - column, values.size - done)
        sums[:n] = 0
        whole = rank - rank % 4
        for k in range(0, whole, 4):  # four at a time halve the traffic; the order is the same
            b0, b1, b2, b3 = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
            a0, a1 = right[k, column : column + n], right[k + 1, column : column + n]
            a2, a3 = right[k + 2, column : column + n], right[k + 3, column : column + n]
            for j in range(n):
                sums[j] = (((sums[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
        for k in range(whole, rank):
            b, a = left[row, k], right[k, column : column + n]
            for j in range(n):
                sums[j] = sums[j] + b * a[j]
        for j in range(n):
            values[done + j] = values[done + j] + scale * sums[j]
        done += n


@compiled
def add_squares(values: Any, first: int, n_columns: int, axis: int, sums: Any) -> None:
    """Add the squares of a piece to those of its rows, or of its columns.

    Args:
        values: (n,) float32: elements [first, first + n) of a matrix.
        first: the piece's first element.
        n_columns: of the matrix.
        axis: 0 for rows, 1 for columns.
        sums: (rows,) or (columns,) float64, added to.
    """
    for i in range(values.size):
        place = (first + i) % n_columns if axis else (first + i) // n_columns
        wide = np.float64(values[i])
        sums[place] += wide * wide


@compiled
def multiply(values: Any, first: int, n_columns: int, axis: int, factors: Any) -> None:
    """Multiply a piece by a factor a row, or a column; the other arguments as above."""
    for i in range(values.size):
        place = (first + i) % n_columns if axis else (first + i) // n_columns
        values[i] = values[i] * factors[place]
