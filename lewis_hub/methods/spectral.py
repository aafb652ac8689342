"""TSV-M, Iso-C and KnOTS: task vectors of matrices, merged in the bases of their singular vectors.

Tensors that are not matrices get the average of their task vectors, or TIES for KnOTS. Singular
values below RANK_EPS times the largest count as zero, because their vectors are arbitrary
(`numerics.singular_values`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.numerics import product, singular_values, summed
from lewis_hub.methods.registry import register
from lewis_hub.methods.ties import ties
from lewis_hub.methods.votes import averaged, elected_votes, trimmed

if TYPE_CHECKING:
    from torch import Tensor


@register("tsv_m", paper="https://arxiv.org/abs/2412.00081", uses_lapack=True)
def tsv_m(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    lambda_: float = 1.0,
) -> Tensor:
    """Keep each expert's largest singular directions and make those of all experts orthogonal.

    Of min(out, in) singular directions each of n experts has the largest [min(out, in) / n]. Their
    left vectors side by side are replaced by the nearest orthogonal matrix, and so are the right.
    A matrix with fewer directions than experts keeps one of each.

    Formula:
        merged = base + lambda U_o diag(w_1 S_1, ..., w_n S_n) V_o^T
        U_o = P Q^T of the SVD P D Q^T of [U_1 ... U_n]; V_o likewise
        U_i, S_i, V_i: the largest singular vectors and values of v_i
    """
    if base.dim() != 2 or not base.numel():
        return base + lambda_ * averaged(task_vectors, weights)
    import torch

    n_directions = max(1, min(base.shape) // len(task_vectors))
    found = [singular_values(vector) for vector in task_vectors]
    left, right = (
        _orthogonal(torch.cat([side[:, :n_directions] for side in sides], dim=1))
        for sides in ([one.left for one in found], [one.right for one in found])
    )
    values = [w * one.values[:n_directions] for w, one in zip(weights, found, strict=True)]
    merged = product(left * torch.cat(values), right.T)
    return base + lambda_ * merged.to(base.dtype)


@register("iso_c", paper="https://arxiv.org/abs/2502.04959", uses_lapack=True)
def iso_c(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    lambda_: float = 1.0,
) -> Tensor:
    """Add the task vectors and give all directions of the sum its mean singular value.

    The mean is over the directions whose singular value is not zero, and the others stay zero; the
    paper's matrices have none of these. With adapters of low rank there are many.

    Formula:
        merged = base + lambda s U V^T
        U, V: singular vectors of sum_i w_i v_i; s: the mean of its singular values
    """
    if base.dim() != 2 or not base.numel():
        return base + lambda_ * averaged(task_vectors, weights)
    votes = (w * vector for w, vector in zip(weights, task_vectors, strict=True))
    found = singular_values(summed(votes, base))
    if not len(found.values):
        return base.clone()
    mean = summed(found.values, found.values[0]) / len(found.values)
    return base + lambda_ * (mean * product(found.left, found.right.T)).to(base.dtype)


@register("knots_ties", paper="https://arxiv.org/abs/2410.19735", uses_lapack=True)
def knots_ties(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Merge by TIES in the space of the singular vectors that the experts share.

    The task vectors are put side by side, (out, n in), and each becomes S V_i^T in the basis U of
    the left singular vectors. TIES merges these. The paper trims all matrices of a model together,
    here each is trimmed by itself.

    Formula:
        merged = base + lambda U ties(S V_1^T, ..., S V_n^T)
        U S [V_1^T ... V_n^T]: the SVD of [v_1 ... v_n]
    """
    if base.dim() != 2 or not base.numel():
        return ties(
            base,
            task_vectors,
            weights=weights,
            densities=densities,
            normalize=normalize,
            lambda_=lambda_,
        )
    import torch

    found = singular_values(torch.cat(list(task_vectors), dim=1))
    aligned = (found.values[:, None] * found.right.T).to(base.dtype)
    parts = aligned.reshape(len(found.values), len(task_vectors), base.shape[1]).transpose(0, 1)
    vectors = trimmed(parts, densities, [None] * len(task_vectors))
    votes = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    merged = elected_votes(votes, weights, normalize=normalize)
    return base + lambda_ * product(found.left.to(base.dtype), merged)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns, or rows, that is nearest: the polar factor."""
    found = singular_values(matrix)
    return product(found.left, found.right.T)
