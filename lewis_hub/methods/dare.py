"""DARE: drop entries of each task vector at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import all_votes, elected_votes
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import drop

if TYPE_CHECKING:
    from torch import Tensor


PAPER = "https://arxiv.org/abs/2311.03099"
ACCEPTED: dict[str, tuple[object, ...]] = {"int8_mask": (True, False)}


@register("dare_linear", paper=PAPER, accepted=ACCEPTED)
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
    """
    votes = _votes(task_vectors, weights, densities, streams, rescale=rescale)
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)


@register("dare_ties", paper=PAPER, accepted=ACCEPTED)
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
    """Drop entries at random, rescale the rest, elect a sign per entry, add what agrees with it."""
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
