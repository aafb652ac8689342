"""Passthrough: one model as it is, or multiplied by a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("passthrough", n_experts=(1, 1))
def passthrough(
    tensors: Tensor,  # (1, *shape) float32
    *,
    scales: Sequence[float],  # one factor; `scale`
) -> Tensor:
    """Take one model as it is, each tensor multiplied by `scale`."""
    return tensors[0] if scales[0] == 1 else scales[0] * tensors[0]
