"""Averages and sums of models, and interpolation between them on a straight line or a sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.methods.numerics import cosine, dot, row_dots, summed
from lewis_hub.methods.registry import INT8_MASK, register
from lewis_hub.methods.votes import all_votes

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

SLERP = "https://doi.org/10.1145/325334.325242"
SINGULAR = 1e-6  # a divisor below this keeps the base; as in mergekit
NEARLY_PARALLEL = 0.9995  # above this |cosine| interpolation is linear; as in mergekit
PARALLEL = 1e-16  # squared sine below which NuSLERP interpolates linearly; as in mergekit
BALANCED = 1e-6  # weights whose sum is below this count as equal; as in mergekit
OPPOSITE = 1e-6  # radians: directions as near to the opposite of the mean are left out


@register("linear", paper="https://arxiv.org/abs/2203.05482", accepted=INT8_MASK)
def linear(
    tensors: Tensor,  # (n_sources, *shape) float32
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    normalize: bool = True,
) -> Tensor:
    """Average the models, each by its weight; `normalize: false` adds them up.

    Weights that add up to zero cannot be normalised: the plan refuses them.

    Formula:
        merged = sum_i w_i x_i / sum_i w_i, without the divisor if normalize is false
    """
    mixed = summed((w * tensor for w, tensor in zip(weights, tensors, strict=True)), tensors[0])
    return mixed / summed(weights, weights[0]) if normalize else mixed


@register(
    "task_arithmetic",
    paper="https://arxiv.org/abs/2212.04089",
    accepted=INT8_MASK | {"rescale": (True, False)},
)
def task_arithmetic(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Add the weighted task vectors to the base.

    Formula:
        merged = base + lambda sum_i w_i v_i, divided by sum_i w_i if normalize is true
    """
    votes = [w * vector for w, vector in zip(weights, task_vectors, strict=True)]
    return base + lambda_ * all_votes(votes, weights, normalize=normalize)


@register("passthrough", n_experts=(1, 1))
def passthrough(
    tensors: Tensor,  # (1, *shape) float32
    *,
    scales: Sequence[float],  # one factor; `scale`
) -> Tensor:
    """Take one model as it is, each tensor multiplied by `scale`.

    Formula:
        merged = scale x
    """
    return tensors[0] if scales[0] == 1 else scales[0] * tensors[0]


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

    Formula:
        merged = (1 - t) base + t mean_i x_i, t = N c / (1 + (N - 1) c)
        c: mean cosine of two task vectors

    Options:
        filter_wise: whether each row has its own t
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


def _row_cosines(products: Floats, first: Floats, second: Floats) -> Floats:
    """Cosines from inner products and squares; 0 where a vector is zero."""
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
    """Take over entries that differ by at most t, and move all others by t.

    Formula:
        merged = base + min(1, t / |x - base|) (x - base), entry by entry

    Options:
        t: the difference up to which an entry is taken over
    """
    other = tensors[0]
    distance = (base - other).abs()
    share = (t / distance).clamp(0.0, 1.0).where(distance != 0, 0.0)
    return share * other + (1 - share) * base


@register("slerp", paper=SLERP, n_experts=(1, 1))
def slerp(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
    *,
    t: float,  # 0 gives the base, 1 the other model
) -> Tensor:
    """Interpolate between the base and one other model along the arc between them.

    Nearly parallel tensors, and opposite ones, are interpolated linearly. A tensor of zeros counts
    as orthogonal to any other. The angle is computed in float64.

    Formula:
        merged = (sin((1 - t) a) base + sin(t a) x) / sin(a)
        a: angle between base and x

    Options:
        t: the position on the arc: 0 gives the base, 1 the other model
    """
    other = tensors[0]
    angle = np.array(cosine(dot(base, other), dot(base, base), dot(other, other)))
    start, end = arc(t, angle, abs(angle) > NEARLY_PARALLEL)
    return float(start) * base + float(end) * other


@register("nuslerp", paper=SLERP, n_experts=(2, 2), base_is_optional=True)
def nuslerp(
    base: Tensor,  # (*shape) float32; zeros where the recipe has no base
    tensors: Tensor,  # (2, *shape) float32
    *,
    weights: Tensor,  # (2,) the second's share of the sum is the position on the arc
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Tensor:
    """Interpolate between two models, or task vectors, along the arc, by their weights.

    With `nuslerp_flatten` a tensor is one vector. Otherwise every row (along the last dimension)
    has its own angle or, with `nuslerp_row_wise`, every vector along the first dimension, as in
    mergekit.

    Formula:
        merged = base + (sin((1 - t) a) v_1 + sin(t a) v_2) / sin(a), t = w_2 / (w_1 + w_2)
        a: angle between v_1 and v_2

    Options:
        weight: the second's share of the sum is the position on the arc
        nuslerp_flatten: whether a tensor is one vector; otherwise each row has its own angle
        nuslerp_row_wise: without `nuslerp_flatten`: vectors along the first dimension instead
    """
    first, second = tensors[0] - base, tensors[1] - base
    w, v = weights.tolist()
    t = v / (w + v) if abs(w + v) >= BALANCED else 0.5
    if nuslerp_flatten:
        angle = np.array(cosine(dot(first, second), dot(first, first), dot(second, second)))
        start, end = arc(t, angle, _parallel(angle))
        return base + (float(start) * first + float(end) * second)
    if nuslerp_row_wise and base.dim() > 1:
        along = first.transpose(0, -1), second.transpose(0, -1)
        turned = _turned_by_row(*along, t).transpose(0, -1)
    else:
        turned = _turned_by_row(first, second, t)
    return base + turned


def arc(t: float, cosines: Floats, straight: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """The factors of two vectors for the point at t of the arc between them; 0 is the first.

    `cosines` are those of the angles; where `straight` holds, the interpolation is linear instead.
    """
    theta = np.arccos(np.where(straight, 0.0, cosines))
    start, end = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return np.where(straight, 1 - t, start), np.where(straight, t, end)


def _turned_by_row(first: Tensor, second: Tensor, t: float) -> Tensor:
    pairs = (first, second), (first, first), (second, second)
    angles = _row_cosines(*(row_dots(a, b).cpu().numpy() for a, b in pairs))
    start, end = arc(t, angles, _parallel(angles))
    return first.new_tensor(start) * first + first.new_tensor(end) * second


def _parallel(cosines: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(1 - cosines**2 <= PARALLEL)


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
    eps: float = 1e-8,  # lengths and mean directions below this count as zero
) -> Tensor:
    """Scale the weighted mean direction of the models, or task vectors, to their mean length.

    mergekit moves the mean direction along the weighted sum of the directions' projections on its
    tangent plane, but that sum is zero. If the weighted directions cancel, the result is the
    weighted sum; mergekit refuses this unless there are two models. A single model is unchanged.

    Formula:
        merged = base + (sum_i s_i |v_i|) m / |m|, m = sum_i s_i v_i / |v_i|, s_i = w_i / sum_j w_j

    Options:
        normalize_weights: whether to divide the weights by their sum
        eps: lengths and mean directions below this count as zero
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


@register("karcher", paper="https://arxiv.org/abs/2603.04972")
def karcher(
    tensors: Tensor,  # (n_sources, *shape) float32
    *,
    max_iter: int = 10,
    tol: float = 1e-5,  # lengths, angles and steps below this count as zero
) -> Tensor:
    """Find the mean of the models' directions on the sphere, and scale it to their mean length.

    All models have equal weight, as in mergekit. Every step is a linear combination of the models,
    so it is computed on their inner products, in float64, and the models are added up once.

    Formula:
        merged = (mean_i |x_i|) m
        m: the unit vector with the least sum_i angle(m, x_i)^2

    Options:
        max_iter: the largest number of steps towards the mean
        tol: lengths, angles and steps below this count as zero
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
    """The Karcher mean of unit vectors, as their factors: cosines (n, n) -> (n,)."""
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
