"""Averages of models and sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.methods.combine import all_votes, summed
from lewis_hub.methods.numerics import cosine, dot, row_dots
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    import numpy.typing as npt
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


@register("passthrough", n_experts=(1, 1))
def passthrough(
    tensors: Tensor,  # (1, *shape) float32
    *,
    scales: Sequence[float],  # one factor; `scale`
) -> Tensor:
    """Take one model as it is, each tensor multiplied by `scale`."""
    return tensors[0] if scales[0] == 1 else scales[0] * tensors[0]


SINGULAR = 1e-6  # a divisor below this keeps the base; as in mergekit


@register("model_stock", paper="https://arxiv.org/abs/2403.19522", n_experts=(2, None))
def model_stock(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (n_sources, *shape) float32, two or more
    *,
    filter_wise: bool = False,
) -> Tensor:
    """Interpolate between the base and the average of the models by the angle between them.

    With N models and the mean cosine c between their task vectors, the share of the average is
    N c / (1 + (N - 1) c): 1 if all are equal, 0 if they are orthogonal. With `filter_wise` each
    row, along the last dimension, has its own share; a vector is one row.
    Cosines are exact for short task vectors too; mergekit divides by no less than 1e-6.
    """
    n = len(tensors)
    vectors = tensors - base
    pairs = list(combinations(range(n), 2))
    if filter_wise:
        squares = [row_dots(vector, vector).cpu().numpy() for vector in vectors]
        cosines = [
            _row_cosines(row_dots(vectors[i], vectors[j]).cpu().numpy(), squares[i], squares[j])
            for i, j in pairs
        ]
    else:
        sizes = [dot(vector, vector) for vector in vectors]
        cosines = [
            np.array(cosine(dot(vectors[i], vectors[j]), sizes[i], sizes[j])) for i, j in pairs
        ]
    mean = sum(cosines, np.zeros_like(cosines[0])) / len(pairs)
    divisor = 1 + (n - 1) * mean
    share = np.divide(n * mean, divisor, out=np.zeros_like(mean), where=abs(divisor) >= SINGULAR)
    # A GPU divides by a plain number inexactly: it multiplies by the reciprocal.
    average = summed(tensors, base) / base.new_tensor(n)
    return base.new_tensor(share) * average + base.new_tensor(1 - share) * base


def _row_cosines(
    products: npt.NDArray[np.float64],
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    lengths = np.sqrt(first) * np.sqrt(second)
    found = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return np.asarray(found.clip(-1.0, 1.0))


@register(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    n_experts=(1, 1),
)
def nearswap(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
    *,
    t: float,  # the largest distance of entries that are taken over
) -> Tensor:
    """Take over entries that differ by at most t, and move all others by t."""
    other = tensors[0]
    distance = (base - other).abs()
    share = (t / distance).clamp(0.0, 1.0).where(distance != 0, 0.0)
    return share * other + (1 - share) * base
