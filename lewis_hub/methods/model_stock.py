"""Model Stock: how far to go from the base to the experts' average, told by their angles."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.methods.combine import summed
from lewis_hub.methods.products import cosine, dot, row_dots
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

SINGULAR = 1e-6  # a divisor below this keeps the base; as in mergekit


@register("model_stock", paper="https://arxiv.org/abs/2403.19522", n_experts=(2, None))
def model_stock(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (n_sources, *shape) float32, two or more
    *,
    filter_wise: bool = False,
) -> Tensor:
    """Go from the base towards the average of the models, as far as they point the same way.

    With N models and the mean cosine c between their task vectors the share of the average is
    N c / (1 + (N - 1) c): 1 where all are equal, 0 where they are at right angles. `filter_wise`
    takes every row, along the last dimension, by itself; a vector is one row.
    Cosines are exact however short the task vectors are; mergekit divides by no less than 1e-6.
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
