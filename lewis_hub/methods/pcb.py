"""PCB-Merging: every entry's weight from its competition within its expert and among experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.methods.combine import summed
from lewis_hub.methods.products import total
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import largest, n_kept

if TYPE_CHECKING:
    from torch import Tensor


@register("pcb", paper="https://arxiv.org/abs/2410.02396")
def pcb(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions of scores kept, each in [0, 1]
    lambda_: float = 1.0,
) -> Tensor:
    """Score every entry within its expert and among experts, average by the scores that are kept.

    The score of expert i is softmax(N norm(v_i v_i)) times the sum over all j of
    softmax(norm(v_i v_j)), entry by entry, with norm a min-max over the entries; the `n_kept`
    largest scores stay. Simplified: a task vector is one tensor's, the paper's the whole model's.
    The published code differs: it scores by exp(N norm(|v_i|)^2) tanh(v_i sum_j v_j), on values
    whose outermost 0.01 % are clamped, and spreads what it keeps from 0 to 1.
    """
    if base.numel() == 0:
        return base
    scores = [_score(i, task_vectors) for i in range(len(task_vectors))]
    kept = [
        score.where(largest(score.flatten(), n_kept(base.numel(), d)).view(base.shape), 0.0)
        for score, d in zip(scores, densities, strict=True)
    ]
    divisor = summed(kept, kept[0])
    shares = [(score / divisor.where(divisor != 0, 1.0)).to(base.dtype) for score in kept]
    chosen = zip(shares, weights, task_vectors, strict=True)
    return base + lambda_ * summed((share * (w * vector) for share, w, vector in chosen), base)


def _score(i: int, vectors: Tensor) -> Tensor:
    own = vectors[i].double()
    within = _softmax(len(vectors) * _norm(own * own))
    among = summed((_softmax(_norm(own * vector.double())) for vector in vectors), own)
    return within * among


def _norm(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values - low


def _softmax(values: Tensor) -> Tensor:
    powers = values.new_tensor(np.exp((values - values.max()).cpu().numpy()))
    # A GPU divides by a plain number inexactly: it multiplies by the reciprocal.
    return powers / values.new_tensor(total(powers))
