"""CABS: keep n of every m entries, and let no two experts keep the same if it can be helped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import summed
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import n_kept

if TYPE_CHECKING:
    from torch import Tensor


@register("cabs", paper="https://arxiv.org/abs/2503.01874")
def cabs(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept of every group, each in [0, 1]
    group: int = 256,  # m in the paper
    lambda_: float = 1.0,
) -> Tensor:
    """Keep the largest entries of every group that earlier experts left free, add them to the base.

    A group is m entries in a row of the flattened tensor; the last may be shorter, which the
    published code prunes away. The experts choose in the recipe's order. Of equal magnitudes the
    smaller index goes first.
    Simplified: where too few entries are free an expert keeps its largest others too, so that
    densities that add up to more than 1 overlap as little as they can.
    """
    taken = base.new_zeros(base.numel()).bool()
    votes = []
    for w, vector, density in zip(weights, task_vectors, densities, strict=True):
        kept = _chosen(vector.abs().flatten(), taken, density, group)
        pruned = vector.where(kept.view(vector.shape), 0.0)
        taken = taken | (pruned != 0).flatten()
        votes.append(w * pruned)
    return base + lambda_ * summed(votes, base)


def _chosen(magnitudes: Tensor, taken: Tensor, density: float, group: int) -> Tensor:
    """Mark n_kept entries of every group: (n,), (n,) bool -> (n,) bool."""
    n = len(magnitudes)
    whole = n - n % group
    parts = [slice(0, whole), slice(whole, n)]
    marked = taken.new_zeros(n)
    for part, width in zip(parts, (group, n - whole), strict=True):
        if part.start == part.stop:
            continue
        # free entries before taken ones, larger before smaller, then by index
        by_size = magnitudes[part].view(-1, width).argsort(dim=1, descending=True, stable=True)
        later = taken[part].view(-1, width).gather(1, by_size)
        order = by_size.gather(1, later.int().argsort(dim=1, stable=True))
        marked[part].view(-1, width).scatter_(1, order[:, : n_kept(width, density)], value=True)
    return marked
