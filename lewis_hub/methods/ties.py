"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import elected_votes
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import rescaled, trim

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    accepted={"int8_mask": (True, False)},
)
def ties(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Trim each task vector, elect a sign per entry, average the sources that agree with it.

    Votes are weighted, as in mergekit; the paper's are not. A drawn vote keeps the base value.
    `rescale` gives what is kept of a task vector the L1 norm of the whole.
    """
    trimmed = [trim(vector, d) for vector, d in zip(task_vectors, densities, strict=True)]
    if rescale:
        trimmed = [rescaled(kept, v) for kept, v in zip(trimmed, task_vectors, strict=True)]
    votes = [w * kept for w, kept in zip(weights, trimmed, strict=True)]
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)
