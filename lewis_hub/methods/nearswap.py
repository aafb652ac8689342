"""NearSwap: take another model's entries where they are near to the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    n_experts=(1, 1),
)
def nearswap(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
    *,
    t: float,  # the distance up to which an entry is taken over whole
) -> Tensor:
    """Take over entries that differ by at most t; of the others t over the difference.

    Beyond t an entry so moves by t.
    """
    other = tensors[0]
    distance = (base - other).abs()
    share = (t / distance).clamp(0.0, 1.0).where(distance != 0, 0.0)
    return share * other + (1 - share) * base
