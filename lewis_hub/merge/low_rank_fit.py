"""A matrix as the product of two thin ones: the best of a rank, or the thinnest within an error.

Found by subspace iteration (Halko, Martinsson and Tropp, arXiv:0909.4061), which costs a few
products with the matrix where a singular value decomposition costs many. Imports torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLED = 10  # directions beside those that are kept
N_ROUNDS = 6  # of the iteration; each sharpens the gap between singular values
SEED = 0
FIRST_RANK = 8


@dataclass(frozen=True)
class Factors:
    """left @ right, and how far that is from the matrix.

    Attributes:
        left: (rows, rank), in the dtype of the file.
        right: (rank, columns), the same.
        error: Frobenius norm of the rest, as a share of the matrix's.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return int(self.left.shape[1])


class Leading(NamedTuple):
    """The first singular vectors and values."""

    left: Tensor  # (rows, rank)
    values: Tensor  # (rank,)
    right: Tensor  # (rank, columns)


def fit(matrix: Tensor, most: int, error: float, dtype: torch.dtype) -> Factors:
    """Fit a matrix by two thin ones, rounded to the dtype that they are stored in.

    Args:
        matrix: (rows, columns) float32, not zero.
        most: rank that is never exceeded.
        error: the lowest rank whose error is no more than this is taken; 0 takes the highest.
        dtype: of the factors on disk; float32 where rounding to it would miss more than the error.
    """
    limit = min(most, *matrix.shape)
    rank = min(limit, FIRST_RANK) if error else limit
    total = float(matrix.double().square().sum())
    while True:
        leading = _leading(matrix, rank)
        found = _lowest(matrix, leading, error, dtype, total) if error else None
        if found or rank == limit:
            return found or _factors(matrix, leading, rank, dtype=dtype, total=total)
        rank = min(limit, 2 * rank)


def _lowest(
    matrix: Tensor, leading: Leading, error: float, dtype: torch.dtype, total: float
) -> Factors | None:
    """The lowest rank within an error, of those whose vectors are known; None: more are needed."""
    squares = leading.values.double().square()
    rest = (1 - squares.cumsum(0) / total).clamp(min=0).sqrt()
    ranks = range(int((rest > error).sum()) + 1, len(squares) + 1)
    for stored in (dtype, torch.float32):
        tried = cache(partial(_factors, matrix, leading, dtype=stored, total=total))
        lowest = bisect_left(ranks, -error, key=partial(_nearness, tried))
        if lowest < len(ranks):
            return tried(ranks[lowest])
    return None


def _nearness(tried: Callable[[int], Factors], rank: int) -> float:
    """It grows with the rank, as far as rounding lets it."""
    return -tried(rank).error


def _factors(
    matrix: Tensor, leading: Leading, rank: int, *, dtype: torch.dtype, total: float
) -> Factors:
    root = leading.values[:rank].sqrt()
    left = (leading.left[:, :rank] * root).to(dtype)
    right = (root[:, None] * leading.right[:rank]).to(dtype)
    missed = (matrix - left.float() @ right.float()).double().square().sum()
    return Factors(left, right, float((missed / total).sqrt()))


def _leading(matrix: Tensor, rank: int) -> Leading:
    n_directions = min(rank + OVERSAMPLED, *matrix.shape)
    if 2 * n_directions >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Leading(left[:, :rank], values[:rank], right[:rank])
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], n_directions, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(N_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    turned, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Leading((basis @ turned)[:, :rank], values[:rank], right[:rank])
