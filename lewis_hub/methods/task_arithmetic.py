"""Sum of task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.methods.combine import all_votes
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "task_arithmetic",
    paper="https://arxiv.org/abs/2212.04089",
    accepted={"int8_mask": (True, False), "rescale": (True, False)},
)
def task_arithmetic(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Add the weighted task vectors to the base."""
    votes = [w * vector for w, vector in zip(weights, task_vectors, strict=True)]
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)
