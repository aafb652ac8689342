"""Sum the votes of several sources: all of them, or those of the elected sign.

Sums run over the sources in their order, from zero; torch's own sum over a dimension adds in an
order that depends on the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


NEGLIGIBLE = 1e-8  # weights whose sum is below this are not divided by; as in mergekit


def summed(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    """Add tensors in order; zeros in the shape of `like` if there are none."""
    total = like.new_zeros(like.shape)
    for term in terms:
        total = total + term
    return total


def all_votes(votes: Sequence[Tensor], weights: Tensor, *, normalize: bool) -> Tensor:
    """Add the weighted task vectors, or average them.

    Args:
        votes: weight times task vector, one a source.
        weights: (n_sources,).
        normalize: divide by the sum of the weights.
    """
    mixed = summed(votes, votes[0])
    total = summed(weights, weights[0])
    return mixed / total if normalize and abs(total) >= NEGLIGIBLE else mixed


def elected_votes(votes: Sequence[Tensor], weights: Tensor, *, normalize: bool) -> Tensor:
    """Elect a sign per entry, then add or average the votes that have it.

    A tie keeps no vote; mergekit counts it as positive.

    Args:
        votes: weight times trimmed task vector, one a source.
        weights: (n_sources,).
        normalize: divide by the sum of the agreeing sources' weights.
    """
    elected = summed(votes, votes[0]).sign()
    agrees = [(vote.sign() == elected) & (vote != 0) for vote in votes]
    mixed = summed((v.where(a, 0.0) for v, a in zip(votes, agrees, strict=True)), votes[0])
    if not normalize:
        return mixed
    total = summed((w * a for w, a in zip(weights, agrees, strict=True)), votes[0])
    return mixed / total.where(total != 0, 1.0)
