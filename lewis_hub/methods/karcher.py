"""Karcher mean: the point on the sphere with the least squared distance to all models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.methods.combine import summed
from lewis_hub.methods.products import dot
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

OPPOSITE = 1e-6  # a direction this far from opposite to the mean, in radians, gives it no pull


@register("karcher", paper="https://arxiv.org/abs/2603.04972")
def karcher(
    tensors: Tensor,  # (n_sources, *shape) float32
    *,
    max_iter: int = 10,
    tol: float = 1e-5,  # lengths, angles and steps below this count as nothing
) -> Tensor:
    """Find the mean of the models' directions on the sphere; its length is their mean length.

    All models count alike, as in mergekit. Every step is a combination of the models, so that it
    is taken on their inner products, in float64, and the models are added up once.
    """
    if len(tensors) == 1:
        return tensors[0]
    lengths = [math.sqrt(dot(tensor, tensor)) for tensor in tensors]
    used = [i for i, length in enumerate(lengths) if length > tol]
    if not used:
        return tensors[0].new_zeros(tensors[0].shape)
    cosines = np.eye(len(used))
    for row, i in enumerate(used):
        for column, j in enumerate(used[:row]):
            product = dot(tensors[i], tensors[j]) / lengths[i] / lengths[j]
            cosines[row, column] = cosines[column, row] = min(max(product, -1.0), 1.0)
    mean = _mean(cosines, max_iter, tol)
    length = math.fsum(lengths) / len(lengths)
    factors = [length * float(m) / lengths[i] for i, m in zip(used, mean, strict=True)]
    return summed((f * tensors[i] for i, f in zip(used, factors, strict=True)), tensors[0])


def _mean(cosines: Floats, max_iter: int, tol: float) -> Floats:
    """Of unit vectors, as what each of them is multiplied by: (n, n) -> (n,)."""
    n = len(cosines)
    mean = np.full(n, 1 / n)
    size = _size(mean, cosines)
    mean = mean / size if size >= tol else np.eye(n)[0]
    for _ in range(max_iter):
        toward = (cosines @ mean).clip(-1.0, 1.0)
        angles = np.arccos(toward)
        pulls = (angles >= tol) & (math.pi - angles > OPPOSITE)
        strengths = np.zeros(n)
        np.divide(angles, np.sin(angles), out=strengths, where=pulls)
        tangent = (strengths - (strengths @ toward) * mean) / n
        step = _size(tangent, cosines)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _size(mean, cosines)
    return mean


def _size(combination: Floats, cosines: Floats) -> float:
    return math.sqrt(max(float(combination @ cosines @ combination), 0.0))
