"""DARE and DELLA: drop entries of task vectors at random, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.kernels import random_bits
from lewis_hub.methods.registry import INT8_MASK, register
from lewis_hub.methods.votes import (
    TRIMS,
    Trim,
    all_votes,
    channel_scales,
    drop,
    elected_votes,
    mask,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

DARE, DELLA = "https://arxiv.org/abs/2311.03099", "https://arxiv.org/abs/2406.11617"


@register("dare_linear", paper=DARE, accepted=INT8_MASK, version=2)
def dare_linear(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources probabilities of being kept, each in [0, 1]
    streams: Sequence[int],  # n_sources streams of random bits
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop entries of each task vector at random, rescale the rest, add them to the base.

    Rescaling divides by the density, as in the paper; mergekit matches the L1 norm instead.

    Formula:
        merged = base + lambda sum_i w_i drop(v_i) / d_i
        drop: keeps each entry with probability d_i
    """
    votes = _votes(task_vectors, weights, densities, streams, rescale=rescale)
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)


@register("dare_ties", paper=DARE, accepted=INT8_MASK, version=2)
def dare_ties(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources probabilities of being kept, each in [0, 1]
    streams: Sequence[int],  # n_sources streams of random bits
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop entries at random, rescale the rest, elect a sign per entry, add what agrees with it.

    Formula:
        merged = base + lambda sum over i in A of u_i, u_i = w_i drop(v_i) / d_i
        drop: keeps each entry with probability d_i
        A: for each entry, the i with sign(u_i) = sign(sum_j u_j)
    """
    votes = _votes(task_vectors, weights, densities, streams, rescale=rescale)
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)


def _votes(
    task_vectors: Tensor,
    weights: Tensor,
    densities: Sequence[float],
    streams: Sequence[int],
    *,
    rescale: bool,
) -> list[Tensor]:
    votes = []
    for w, vector, d, stream in zip(weights, task_vectors, densities, streams, strict=True):
        factor = 1 / d if rescale and d > 0 else 1.0
        votes.append(w * (factor * drop(vector, d, stream)))
    return votes


@register("della", paper=DELLA, accepted=INT8_MASK | {"trim": TRIMS}, version=2)
def della(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources mean probabilities of being kept, each in [0, 1]
    spreads: Sequence[float],  # n_sources distances from the mean, each in [0, 0.5]; `epsilon`
    streams: Sequence[int],  # n_sources streams of random bits
    grams: Sequence[Tensor | None] = (),  # n_sources second moments, where `trim` needs them
    transposed: bool = False,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Drop small entries more often, rescale the rest, elect a sign per entry, average what agrees.

    Rescaling divides by an entry's own probability, as in the paper; mergekit matches the L1 norm.
    With `trim: activation` entries are ranked by magnitude times the activation norm of their
    input. Tensors without second moments of a source are ranked by magnitude.

    Formula:
        merged = base + lambda (sum over i in A of u_i) / (sum over i in A of w_i)
        u_i = w_i drop(v_i) / p_i
        drop: keeps an entry with probability p_i, from d_i - epsilon to d_i + epsilon by its rank
        A: for each entry, the i with sign(u_i) = sign(sum_j u_j)
    """
    scales = channel_scales(
        grams or [None] * len(densities), trim, trim_exponent, transposed=transposed
    )
    rows = zip(weights, task_vectors, densities, spreads, streams, scales, strict=True)
    votes = [w * drop_by_rank(*rest, rescale=rescale) for w, *rest in rows]
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)


@register("della_linear", paper=DELLA, accepted=INT8_MASK | {"trim": TRIMS}, version=2)
def della_linear(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources mean probabilities of being kept, each in [0, 1]
    spreads: Sequence[float],  # n_sources distances from the mean, each in [0, 0.5]; `epsilon`
    streams: Sequence[int],  # n_sources streams of random bits
    grams: Sequence[Tensor | None] = (),  # n_sources second moments, where `trim` needs them
    transposed: bool = False,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Drop small entries more often, rescale the rest, add them to the base; see `della`.

    Formula:
        merged = base + lambda sum_i w_i drop(v_i) / p_i
        drop: keeps an entry with probability p_i, from d_i - epsilon to d_i + epsilon by its rank
    """
    known = grams or [None] * len(task_vectors)
    scales = channel_scales(known, trim, trim_exponent, transposed=transposed)
    rows = zip(weights, task_vectors, densities, spreads, streams, scales, strict=True)
    votes = [w * drop_by_rank(*rest, rescale=rescale) for w, *rest in rows]
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)


def probabilities(n: int, density: float, spread: float) -> npt.NDArray[np.float64]:
    """Probabilities to be kept, by rank in a row of n: (n,), density - spread to density + spread.

    If that leaves [0, 1], the spread is narrowed, so that guides can set any density and the mean
    is the density; mergekit refuses. A row of one entry has the density.
    """
    narrowed = min(spread, density, 1 - density)
    ranks = np.arange(n) / (n - 1) if n > 1 else np.full(n, 0.5)
    return np.clip(density - narrowed + 2 * narrowed * ranks, 0.0, 1.0)


def allowances(
    n: int, density: float, spread: float, *, rescale: bool
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """By rank in a row of n: the bound of the random bits of a kept entry, and its factor."""
    by_rank = probabilities(n, density, spread)
    below = np.rint(by_rank * random_bits.HALVES).astype(np.uint64)
    if not rescale:
        return below, np.ones(n)
    return below, np.divide(1.0, by_rank, out=np.zeros(n), where=below > 0)


def drop_by_rank(  # noqa: PLR0913
    task_vector: Tensor,
    density: float,
    spread: float,
    stream: int,
    scale: Tensor | None = None,
    *,
    rescale: bool,
) -> Tensor:
    """Keep each entry with the probability that its rank by magnitude within its row gives it.

    A row runs along the last dimension; a vector is one row. The smallest entry has rank 0; of
    equal magnitudes the one with the smaller index has the lower rank. Magnitudes are multiplied
    by `scale`, (in,) or (in, 1).
    """
    import torch

    if density >= 1 or task_vector.numel() == 0:
        return task_vector
    rows = task_vector.reshape(-1, task_vector.shape[-1] if task_vector.dim() else 1)
    counted = (task_vector if scale is None else task_vector * scale).reshape(rows.shape)
    order = _order(counted.abs())
    below, factors = allowances(rows.shape[1], density, spread, rescale=rescale)
    least = _placed(torch.from_numpy(below.astype(np.int64)), order).flatten().numpy()
    kept = mask(random_bits.halves(stream, rows.numel()) < least, rows)
    scaled = rows * _placed(torch.from_numpy(factors).to(rows.dtype), order).to(rows.device)
    return scaled.where(kept, 0.0).reshape(task_vector.shape)


def _order(magnitudes: Tensor) -> Tensor:
    """A stable argsort of each row, on the CPU.

    Non-negative floats have the order of their bits. With the index below the bits of a float32 no
    two keys are equal, and numpy sorts integers fifteen times as fast as torch sorts floats stably.
    """
    import torch

    if magnitudes.dtype != torch.float32:
        return magnitudes.argsort(dim=1, stable=True).cpu()
    places = torch.arange(magnitudes.shape[1])
    keys = magnitudes.cpu().view(torch.int32).long() << 32 | places
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF


def _placed(by_rank: Tensor, order: Tensor) -> Tensor:
    """Scatter values by rank, (n,), to the entries of `order`, (n_rows, n)."""
    return by_rank.new_empty(order.shape).scatter_(1, order, by_rank.expand_as(order))
