"""Inner products in float64, added up in an order that no number of threads can change.

torch splits a long sum among its threads, and another split rounds otherwise. Here neighbours are
added pairwise, halves to halves, until one number is left.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # elements that are held in float64 at a time


def dot(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of one shape, taken as vectors; 0 for empty ones."""
    a, b = first.flatten(), second.flatten()
    return math.fsum(
        float(_folded(a[start : start + CHUNK].double() * b[start : start + CHUNK].double()))
        for start in range(0, len(a), CHUNK)
    )


def total(values: Tensor) -> float:
    """The sum of all entries; 0 where there are none."""
    return dot(values, values.new_ones(values.shape))


def row_dots(first: Tensor, second: Tensor) -> Tensor:
    """The inner product of every two rows: (*shape) -> (*shape without the last, 1) float64.

    A row runs along the last dimension. A tensor without dimensions is one row of one entry.
    """
    if first.dim() == 0:
        return first.double() * second.double()
    shape = (*first.shape[:-1], 1)
    found = first.new_zeros(shape).double()
    if first.numel() == 0:
        return found
    width = first.shape[-1]
    a, b, out = first.reshape(-1, width), second.reshape(-1, width), found.view(-1)
    step = max(1, CHUNK // width)
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        out[rows] = _folded(a[rows].double() * b[rows].double())
    return found


def cosine(product: float, first: float, second: float) -> float:
    """Of the angle between two vectors.

    Args:
        product: of the two.
        first: inner product of the one with itself.
        second: of the other.

    Returns:
        0 where one of them is zero: it has no direction.
    """
    length = math.sqrt(first) * math.sqrt(second)
    return min(max(product / length, -1.0), 1.0) if length else 0.0


def _folded(values: Tensor) -> Tensor:
    """Sum over the last dimension, which is not empty: (..., n) -> (...)."""
    while (n := values.shape[-1]) > 1:
        half = n // 2
        pairs = values[..., :half] + values[..., half : 2 * half]
        if n % 2:
            pairs[..., 0] += values[..., -1]
        values = pairs
    return values[..., 0]
