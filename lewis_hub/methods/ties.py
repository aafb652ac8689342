"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import elected_votes
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import TRIMS, Trim, channel_scales, rescaled, trimmed

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    accepted={"int8_mask": (True, False), "trim": TRIMS},
)
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
    """
    known = grams or [None] * len(task_vectors)
    scales = channel_scales(known, trim, trim_exponent, transposed=transposed)
    vectors = trimmed(task_vectors, densities, scales)
    if rescale:
        vectors = [rescaled(kept, v) for kept, v in zip(vectors, task_vectors, strict=True)]
    votes = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    return base + lambda_ * elected_votes(votes, weights, normalize=normalize)
