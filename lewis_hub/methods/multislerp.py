"""Multi-SLERP: the weighted mean direction of several models, at their mean length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import summed
from lewis_hub.methods.products import dot
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "multislerp",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    base_is_optional=True,
)
def multislerp(
    base: Tensor,  # (*shape) float32; zeros where the recipe has no base
    tensors: Tensor,  # (n_sources, *shape) float32
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    normalize_weights: bool = True,
    eps: float = 1e-8,  # lengths and mean directions below this count as nothing
) -> Tensor:
    """Turn to the weighted mean direction of the models, or task vectors, at their mean length.

    mergekit goes on from the mean direction along the weighted sum of the directions' projections
    on its tangent plane. That sum is zero wherever the mean is, so the path ends where it starts.
    Where the weighted directions cancel, the weighted sum stands in for any number of models;
    mergekit stops there unless they are two. One model alone is itself.
    """
    if len(tensors) == 1:
        return tensors[0]
    vectors = tensors - base
    shares = weights.double().tolist()
    if normalize_weights:
        total = math.fsum(shares)
        shares = [share / total for share in shares]
    lengths = [math.sqrt(dot(vector, vector)) for vector in vectors]
    parts = [share / (length + eps) for share, length in zip(shares, lengths, strict=True)]
    mean = summed((part * vector for part, vector in zip(parts, vectors, strict=True)), base)
    size = math.sqrt(dot(mean, mean))
    if size < eps:
        pairs = zip(shares, vectors, strict=True)
        return base + summed((share * vector for share, vector in pairs), base)
    length = math.fsum(s * one for s, one in zip(shares, lengths, strict=True))
    return base + (length / size) * mean
