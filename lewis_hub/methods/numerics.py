"""Inner products in float64, added up in an order that no number of threads can change.

torch splits a long sum among its threads, and another split rounds otherwise. Here neighbours are
added pairwise, halves to halves, until one number is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


STEP = 128
LEAST_ROWS = 8  # one row times a matrix takes another path, which may split the inner side


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor, padded to whole steps.

    Attributes:
        lower: (n, n), lower triangular, in float64 where float32 was not enough; what is above the
            diagonal means nothing.
        inverses: (n / STEP, STEP, STEP) of its blocks on the diagonal.
    """

    lower: Tensor
    inverses: Tensor


def factor(matrix: Tensor) -> Factor | None:
    """Factor a symmetric (n, n) matrix; None where it is not positive definite, rounding apart."""
    return _factored(_padded_matrix(matrix)) or _factored(_padded_matrix(matrix.double()))


def solve(rows: Tensor, found: Factor) -> Tensor:
    """Solve x @ matrix = rows for x: (m, n) -> (m, n), in the dtype of `rows`."""
    lower, inverses = found.lower, found.inverses
    x = _padded_rows(rows, len(lower)).to(lower.dtype)
    starts = range(0, len(lower), STEP)
    for start, inverse in zip(starts, inverses, strict=True):
        here, rest = slice(start, start + STEP), slice(start + STEP, None)
        x[:, here] = x[:, here] @ inverse.T
        x[:, rest] -= x[:, here] @ lower[rest, here].T
    for start, inverse in reversed(list(zip(starts, inverses, strict=True))):
        here, rest = slice(start, start + STEP), slice(0, start)
        x[:, here] = x[:, here] @ inverse
        x[:, rest] -= x[:, here] @ lower[here, rest]
    return x[: len(rows), : rows.shape[1]].to(rows.dtype)


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """The product of (m, k) and (k, n)."""
    padded = _padded_rows(rows, rows.shape[1])
    total = padded.new_zeros(len(padded), matrix.shape[1])
    for start in range(0, len(matrix), STEP):
        total.addmm_(padded[:, start : start + STEP], matrix[start : start + STEP])
    return total[: len(rows)]


def _factored(lower: Tensor) -> Factor | None:
    """Work in place, from left to right."""
    import torch

    inverses = []
    one = torch.eye(STEP, dtype=lower.dtype, device=lower.device)
    for start in range(0, len(lower), STEP):
        here, rest = slice(start, start + STEP), slice(start + STEP, None)
        root, failed = torch.linalg.cholesky_ex(lower[here, here])
        if int(failed):
            return None
        inverses.append(torch.linalg.solve_triangular(root, one, upper=False))
        lower[here, here] = root
        lower[rest, here] = lower[rest, here] @ inverses[-1].T
        lower[rest, rest] -= lower[rest, here] @ lower[rest, here].T
    return Factor(lower, torch.stack(inverses))


def _padded_matrix(matrix: Tensor) -> Tensor:
    """A copy with ones on the diagonal where it is longer."""
    n = len(matrix)
    padded = matrix.new_zeros(-(-n // STEP) * STEP, -(-n // STEP) * STEP)
    padded[:n, :n] = matrix
    padded.diagonal()[n:] = 1
    return padded


def _padded_rows(rows: Tensor, width: int) -> Tensor:
    """A copy with zeros where it is longer or wider."""
    padded = rows.new_zeros(max(len(rows), LEAST_ROWS), width)
    padded[: len(rows), : rows.shape[1]] = rows
    return padded
