"""Weighted average of whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.methods.combine import summed
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("linear", paper="https://arxiv.org/abs/2203.05482", accepted={"int8_mask": (True, False)})
def linear(
    tensors: Tensor,  # (n_sources, *shape) float32
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    normalize: bool = True,
) -> Tensor:
    """Average the models, each by its weight; `normalize: false` adds them up.

    Weights that add up to zero cannot be normalised: the plan refuses them.
    """
    mixed = summed((w * tensor for w, tensor in zip(weights, tensors, strict=True)), tensors[0])
    return mixed / summed(weights, weights[0]) if normalize else mixed
