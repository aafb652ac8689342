"""A matrix as the product of two thin ones: the best of a rank, or the thinnest within an error.

Found by subspace iteration (Halko, Martinsson and Tropp, arXiv:0909.4061), which costs a few
products with the matrix where a singular value decomposition costs many. Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        left: (rows, rank) float32.
        right: (rank, columns) float32.
        error: Frobenius norm of the rest, as a share of the matrix's.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return int(self.left.shape[1])


def fit(matrix: Tensor, most: int, error: float, dtype: torch.dtype) -> Factors:
    """Fit a matrix by two thin ones, rounded to the dtype that they are stored in.

    Args:
        matrix: (rows, columns) float32, not zero.
        most: rank that is never exceeded.
        error: the lowest rank whose error is no more than this is taken; 0 takes the highest.
        dtype: of the factors on disk.
    """
    limit = min(most, *matrix.shape)
    rank = min(limit, FIRST_RANK) if error else limit
    while True:
        left, values, right = _leading(matrix, rank)
        total = float(matrix.double().square().sum())
        rest = (total - values.double().square().cumsum(0)).clamp(min=0) / total
        within = (rest.sqrt() <= error).nonzero()
        if len(within) or rank == limit:
            break
        rank = min(limit, 2 * rank)
    kept = int(within[0]) + 1 if error and len(within) else rank
    root = values[:kept].sqrt()
    thin = (left[:, :kept] * root).to(dtype).float(), (root[:, None] * right[:kept]).to(dtype)
    factors = thin[0], thin[1].float()
    missed = (matrix - factors[0] @ factors[1]).double().square().sum()
    return Factors(*factors, float((missed / total).sqrt()))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: (rows, rank), (rank,), (rank, columns)."""
    n_directions = min(rank + OVERSAMPLED, *matrix.shape)
    if 2 * n_directions >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], n_directions, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(N_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    turned, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ turned)[:, :rank], values[:rank], right[:rank]
