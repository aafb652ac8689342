"""Arcee Fusion: take over another model's entries where they matter most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.methods.products import CHUNK
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

FLOOR = 1e-8  # added to every probability; as in mergekit
REACH = 1.5  # quartile ranges above the median; as in mergekit


@register("arcee_fusion", paper="https://arcee.ai", n_experts=(1, 1))
def arcee_fusion(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
) -> Tensor:
    """Take over the entries whose importance stands out in their tensor, the others from the base.

    Importance is the distance between the two models' entries times the Kullback-Leibler divergence
    of their rows' softmax (a row runs along the last dimension). It stands out at the median plus
    1.5 times the distance between the quartiles. Quartiles are exact and divergences in float64;
    mergekit draws a million entries at random, and rounds divergences of float32 sums.
    """
    other = tensors[0]
    if base.numel() == 0:
        return base
    divergence = base.new_tensor(_divergences(other, base))
    per_row = (*base.shape[:-1], 1) if base.dim() else ()
    importance = (other - base).abs() * divergence.view(per_row)
    ordered = importance.flatten().sort().values
    quartiles = ordered[[q * (len(ordered) - 1) // 4 for q in (1, 2, 3)]]
    threshold = quartiles[1] + REACH * (quartiles[2] - quartiles[0])
    return other.where(importance >= threshold, base)


def _divergences(first: Tensor, second: Tensor) -> Floats:
    """Of every two rows: (*shape) -> (n_rows,)."""
    width = first.shape[-1] if first.dim() else 1
    rows, others = first.reshape(-1, width), second.reshape(-1, width)
    step = max(1, CHUNK // width)
    found = [
        _divergence(rows[start : start + step], others[start : start + step])
        for start in range(0, len(rows), step)
    ]
    return np.concatenate(found)


def _divergence(rows: Tensor, others: Tensor) -> Floats:
    p, q = (_softmax(x.double().cpu().numpy()) + FLOOR for x in (rows, others))
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def _softmax(rows: Floats) -> Floats:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
