"""Systems with a positive definite matrix: the same bytes on any number of threads.

LAPACK's Cholesky and a long inner product round otherwise when they are split among threads. Here
both go in steps of STEP columns, each a product of matrices with a short inner side, which threads
split among rows and columns only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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
