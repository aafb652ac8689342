"""SCE: select where the experts differ, weigh them by what is selected, erase the minority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import summed
from lewis_hub.methods.products import dot
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import largest, n_kept

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "sce",
    paper="https://arxiv.org/abs/2408.07990",
    accepted={"int8_mask": (True, False)},
    n_experts=(2, None),
)
def sce(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base; two or more
    *,
    densities: Sequence[float],  # n_sources fractions of the selection, each in [0, 1]
    select_topk: float = 1.0,
) -> Tensor:
    """Keep what varies most, weigh each source by its squares, average what agrees in sign.

    Of the entries that vary at all a source keeps the `n_kept` with the largest variance, at
    `select_topk` times its own density; mergekit has no densities, and rounds down. A drawn vote
    keeps the base's value. The weights divide by any sum that is not zero; mergekit takes equal
    weights where it is below 1e-6, as it is for short task vectors.
    """
    selected = _selected(task_vectors, [select_topk * density for density in densities])
    squares = [dot(vector, vector) for vector in selected]
    total = math.fsum(squares)
    shares = [square / total if total else 1 / len(selected) for square in squares]
    elected = summed(selected, base).sign()
    agrees = [(vector.sign() == elected) & (vector != 0) for vector in selected]
    chosen = list(zip(shares, selected, agrees, strict=True))
    mixed = summed((share * v.where(a, 0.0) for share, v, a in chosen), base)
    divisor = summed((share * a.to(base.dtype) for share, _, a in chosen), base)
    return base + mixed / divisor.where(divisor != 0, 1.0)


def _selected(task_vectors: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    if min(fractions) >= 1:
        return list(task_vectors)
    vectors = task_vectors.double()
    # A GPU divides by a plain number inexactly: it multiplies by the reciprocal.
    mean = summed(vectors, vectors[0]) / vectors.new_tensor(len(vectors))
    variance = summed(((v - mean).square() for v in vectors), mean).flatten()
    n_varying = int((variance > 0).sum())
    return [
        v if f >= 1 else v.where(largest(variance, n_kept(n_varying, f)).view(v.shape), 0.0)
        for v, f in zip(task_vectors, fractions, strict=True)
    ]
