"""TIES and Model Breadcrumbs: keep entries of task vectors by their magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.registry import INT8_MASK, register
from lewis_hub.methods.votes import (
    TRIMS,
    Trim,
    all_votes,
    channel_scales,
    elected_votes,
    largest,
    n_kept,
    rescaled,
    trimmed,
)

if TYPE_CHECKING:
    from torch import Tensor

BREADCRUMBS = "https://arxiv.org/abs/2312.06795"


@register("ties", paper="https://arxiv.org/abs/2306.01708", accepted=INT8_MASK | {"trim": TRIMS})
def ties(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    grams: Sequence[Tensor | None] = (),  # n_sources second moments, where `trim` needs them
    transposed: bool = False,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Trim each task vector, elect a sign per entry, average the sources that agree with it.

    Votes are weighted, as in mergekit; the paper's are not. A tie keeps the base value.
    `rescale` restores the L1 norm of the task vector.
    With `trim: activation` entries are ranked by magnitude times the activation norm of their
    input. Tensors without second moments of a source are trimmed by magnitude.

    Formula:
        merged = base + lambda (sum over i in A of u_i) / (sum over i in A of w_i)
        u_i = w_i trim(v_i)
        trim: keeps the d_i n largest of n entries
        A: for each entry, the i with sign(u_i) = sign(sum_j u_j)
    """
    known = grams or [None] * len(task_vectors)
    scales = channel_scales(known, trim, trim_exponent, transposed=transposed)
    vectors = trimmed(task_vectors, densities, scales)
    if rescale:
        vectors = [rescaled(kept, v) for kept, v in zip(vectors, task_vectors, strict=True)]
    votes = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)


@register("breadcrumbs", paper=BREADCRUMBS, accepted=INT8_MASK)
def breadcrumbs(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    outliers: Sequence[float],  # n_sources fractions dropped from the top, in [0, 1]; `gamma`
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop the largest and the smallest entries of each task vector, add the rest to the base.

    Formula:
        merged = base + lambda sum_i w_i band(v_i)
        band: drops the gamma n largest of n entries, keeps the d_i n largest of the others
    """
    rows = zip(weights, task_vectors, densities, outliers, strict=True)
    votes = [w * keep_band(*rest, rescale=rescale) for w, *rest in rows]
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)


@register("breadcrumbs_ties", paper=BREADCRUMBS, accepted=INT8_MASK)
def breadcrumbs_ties(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    outliers: Sequence[float],  # n_sources fractions dropped from the top, in [0, 1]; `gamma`
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop the largest and the smallest entries, elect a sign per entry, add what agrees.

    Formula:
        merged = base + lambda sum over i in A of u_i, u_i = w_i band(v_i)
        band: drops the gamma n largest of n entries, keeps the d_i n largest of the others
        A: for each entry, the i with sign(u_i) = sign(sum_j u_j)
    """
    rows = zip(weights, task_vectors, densities, outliers, strict=True)
    votes = [w * keep_band(*rest, rescale=rescale) for w, *rest in rows]
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)


def keep_band(
    task_vector: Tensor, density: float, fraction: float, *, rescale: bool = False
) -> Tensor:
    """Keep exactly the `n_kept` largest entries after the outliers are dropped.

    Outliers are the round(fraction n) largest entries, but never so many that fewer than `n_kept`
    are left. mergekit rounds both numbers down. `rescale` restores the L1 norm of the task vector.
    """
    n = task_vector.numel()
    k = n_kept(n, density)
    magnitudes = task_vector.abs().flatten()
    dropped = largest(magnitudes, min(round(fraction * n), n - k))
    kept = largest(magnitudes.masked_fill(dropped, -1.0), k)
    band = task_vector.where(kept.reshape(task_vector.shape), 0.0)
    return rescaled(band, task_vector) if rescale else band
