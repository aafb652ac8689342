"""Methods that select entries by a score: SCE, PCB, CABS and Arcee Fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.methods.numerics import CHUNK, dot, summed, total
from lewis_hub.methods.registry import INT8_MASK, register
from lewis_hub.methods.votes import largest, n_kept

if TYPE_CHECKING:
    from torch import Tensor


@register("sce", paper="https://arxiv.org/abs/2408.07990", accepted=INT8_MASK, n_experts=(2, None))
def sce(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base; two or more
    *,
    densities: Sequence[float],  # n_sources fractions of the selection, each in [0, 1]
    select_topk: float = 1.0,
) -> Tensor:
    """Keep the entries that vary most, weight each source by its squares, average the elected sign.

    A source keeps the `n_kept` entries with the largest variance, of those that vary at all, at
    `select_topk` times its own density; mergekit has no densities, and rounds down. A tie keeps
    the base's value. The weights divide by any sum that is not zero; mergekit takes equal weights
    if the sum is below 1e-6, as for short task vectors.

    Formula:
        merged = base + (sum over i in A of s_i e(v_i)) / (sum over i in A of s_i)
        s_i = |e(v_i)|^2 / sum_j |e(v_j)|^2
        e: keeps the entries with the largest variance over the sources
        A: for each entry, the i with sign(e(v_i)) = sign(sum_j e(v_j))

    Options:
        select_topk: the fraction of entries that are selected
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


@register("pcb", paper="https://arxiv.org/abs/2410.02396")
def pcb(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions of scores kept, each in [0, 1]
    lambda_: float = 1.0,
) -> Tensor:
    """Average by the largest scores within and among experts (PCB-Merging, simplified).

    The score of expert i is softmax(N norm(v_i v_i)) times the sum over all j of
    softmax(norm(v_i v_j)), entry by entry, with norm a min-max over the entries; the `n_kept`
    largest scores stay. Simplified: a task vector is one tensor's, the paper's the whole model's.
    The published code differs: it scores by exp(N norm(|v_i|)^2) tanh(v_i sum_j v_j), on values
    whose outermost 0.01 % are clamped, and spreads what it keeps from 0 to 1.

    Formula:
        merged = base + lambda sum_i w_i v_i p_i / sum_j p_j
        p_i: the d_i n largest of softmax(N norm(v_i v_i)) sum_j softmax(norm(v_i v_j))
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


@register("cabs", paper="https://arxiv.org/abs/2503.01874")
def cabs(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) mixing coefficients
    densities: Sequence[float],  # n_sources fractions kept of every group, each in [0, 1]
    group: int = 256,  # m in the paper
    lambda_: float = 1.0,
) -> Tensor:
    """Keep and add each group's largest entries that earlier experts left (CABS, simplified).

    A group is m consecutive entries of the flattened tensor; the last may be shorter, which the
    published code prunes away. The experts choose in the recipe's order. Of equal magnitudes the
    smaller index goes first.
    Simplified: if too few entries are free, an expert also keeps its largest taken ones, so that
    densities that add up to more than 1 overlap as little as possible.

    Formula:
        merged = base + lambda sum_i w_i prune_i(v_i)
        prune_i: keeps d_i m of each m entries, the largest of those that experts before i did not
        keep, and if these are too few the largest of the others

    Options:
        group: the number of consecutive entries, m, of which each expert keeps the largest
    """
    taken = base.new_zeros(base.numel()).bool()
    votes = []
    for w, vector, density in zip(weights, task_vectors, densities, strict=True):
        kept = _chosen(vector.abs().flatten(), taken, density, group)
        pruned = vector.where(kept.view(vector.shape), 0.0)
        taken = taken | (pruned != 0).flatten()
        votes.append(w * pruned)
    return base + lambda_ * summed(votes, base)


def _chosen(magnitudes: Tensor, taken: Tensor, density: float, group: int) -> Tensor:
    """Mark n_kept entries of every group: (n,), (n,) bool -> (n,) bool."""
    n = len(magnitudes)
    whole = n - n % group
    parts = [slice(0, whole), slice(whole, n)]
    marked = taken.new_zeros(n)
    for part, width in zip(parts, (group, n - whole), strict=True):
        if part.start == part.stop:
            continue
        # free entries before taken ones, larger before smaller, then by index
        by_size = magnitudes[part].view(-1, width).argsort(dim=1, descending=True, stable=True)
        later = taken[part].view(-1, width).gather(1, by_size)
        order = by_size.gather(1, later.int().argsort(dim=1, stable=True))
        marked[part].view(-1, width).scatter_(1, order[:, : n_kept(width, density)], value=True)
    return marked


Floats = npt.NDArray[np.float64]

FLOOR = 1e-8  # added to every probability; as in mergekit
REACH = 1.5  # quartile ranges above the median; as in mergekit


@register("arcee_fusion", paper="https://arcee.ai", n_experts=(1, 1))
def arcee_fusion(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
) -> Tensor:
    """Take over the entries with the largest importance in their tensor, the others from the base.

    Importance is the distance between the two models' entries times the Kullback-Leibler divergence
    of their rows' softmax (a row runs along the last dimension). The threshold is the median plus
    1.5 times the distance between the quartiles. Quartiles are exact and divergences in float64;
    mergekit draws a million entries at random, and rounds divergences of float32 sums.

    Formula:
        merged = x where s >= median(s) + 1.5 (q_3 - q_1), base elsewhere; q: quartiles of s
        s = |x - base| KL(softmax(x), softmax(base)), softmax over each row
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
    p, q = (_softmax_over_all(x.double().cpu().numpy()) + FLOOR for x in (rows, others))
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def _softmax_over_all(rows: Floats) -> Floats:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
