"""Arithmetic whose result does not depend on the number of threads.

torch splits a long sum among its threads, and each split rounds differently. Here tensors are added
in order, and inner products add neighbours pairwise in float64: both are equal on all machines.
LAPACK and BLAS run on one thread: their results are equal on all machines of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # elements converted to float64 at a time
RANK_EPS = 2.0**-24  # times the longer side: what float32 leaves of a singular value that is zero
LARGE = 2.0**40
TOLERANCE = 1e-4  # of a tensor's norm, for tensors that statistics of another machine made


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Limit torch to a number of threads in the calling thread; restore the old limit on exit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, in float64; None if it is not definite."""
    import torch

    with torch_threads(1):
        lower, failed = torch.linalg.cholesky_ex(matrix.double())
    return None if int(failed) else lower


def solve(rows: Tensor, lower: Tensor) -> Tensor:
    """Solve x @ matrix = rows: (m, n) -> (m, n) in the dtype of `rows`; `lower` from `cholesky`."""
    import torch

    with torch_threads(1):
        return torch.cholesky_solve(rows.double().T, lower).T.to(rows.dtype)


@dataclass(frozen=True)
class SingularValues:
    """A matrix as left diag(values) right^T, float64."""

    left: Tensor  # (m, rank)
    values: Tensor  # (rank,), falling, all positive
    right: Tensor  # (n, rank)


def singular_values(matrix: Tensor) -> SingularValues:
    """The singular value decomposition of (m, n), without values that are zero up to rounding.

    One direction of NaN if an entry is infinite, as a difference of large weights can be.
    """
    import torch

    if not all_finite(matrix):
        unknown = (torch.full((n, 1), math.nan, dtype=torch.float64) for n in matrix.shape)
        left, right = (one.to(matrix.device) for one in unknown)
        return SingularValues(left, left[0], right)
    with torch_threads(1):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    largest = float(values[0]) if len(values) else 0.0
    rank = int((values > RANK_EPS * max(matrix.shape) * largest).sum())
    return SingularValues(left[:, :rank], values[:rank], right[:rank].T)


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """The product of (m, k) and (k, n).

    `rows` is copied, as BLAS may round differently if memory is not aligned as torch aligns it.
    """
    with torch_threads(1):
        return rows.clone() @ matrix


def summed(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    """Add tensors in order; zeros in the shape of `like` if there are none."""
    total = like.new_zeros(like.shape)
    for term in terms:
        total = total + term
    return total


def dot(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of equal shape, as vectors; 0 for empty tensors."""
    a, b = first.flatten(), second.flatten()
    return math.fsum(
        float(_folded(a[start : start + CHUNK].double() * b[start : start + CHUNK].double()))
        for start in range(0, len(a), CHUNK)
    )


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite: by the extremes, in one pass without a copy."""
    if not values.numel():
        return True
    low, high = values.aminmax()  # both are NaN if an entry is
    return math.isfinite(float(low)) and math.isfinite(float(high))


def in_range(values: Tensor) -> Tensor:
    """Finite values whose squares fit into float32: larger ones are divided by a power of two."""
    if not values.numel():
        return values
    largest = max(abs(float(end)) for end in values.aminmax())
    return values if largest <= LARGE else values / 2.0 ** (math.frexp(largest)[1] - 1)


def total(values: Tensor) -> float:
    """The sum of all entries; 0 for an empty tensor."""
    return dot(values, values.new_ones(values.shape))


def row_dots(first: Tensor, second: Tensor) -> Tensor:
    """The inner product of each pair of rows: (*shape) -> (*shape without the last, 1) float64.

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
    """The cosine of the angle between two vectors, by their inner product and their squares.

    It is 0 if a vector is zero, and has no direction.
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


def within_tolerance(rebuilt: Tensor, stored: Tensor) -> bool:
    """Whether two tensors that were merged by statistics differ by rounding alone.

    Machines of different kinds round sums and matrix products differently. The Frobenius norm of
    the difference may be TOLERANCE of the norm of `stored` in float32. Other dtypes add two
    epsilons, 1.6e-2 in bfloat16: an entry of an early block that is rounded to the other neighbour
    changes the inputs on which later blocks are fitted. The demo differs by 8e-6 in float32,
    5.5e-3 in bfloat16. Merges without statistics have equal bytes on all machines.
    """
    import torch

    if rebuilt.shape != stored.shape or rebuilt.dtype != stored.dtype:
        return False
    difference, norm = rebuilt.float() - stored.float(), math.sqrt(dot(stored, stored))
    if not math.isfinite(norm):  # it would allow any difference
        return rebuilt.equal(stored)
    limit = TOLERANCE + torch.finfo(stored.dtype).eps * 2
    return math.sqrt(dot(difference, difference)) <= limit * norm
