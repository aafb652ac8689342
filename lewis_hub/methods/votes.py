"""Turn task vectors into votes: keep a fraction of each; add all votes, or those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lewis_hub.kernels import random_bits
from lewis_hub.methods.numerics import summed, total

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

Trim = Literal["magnitude", "activation"]
NEGLIGIBLE = 1e-8  # weights whose sum is below this are not divided by; as in mergekit
TRIMS = ("magnitude", "activation")


def n_kept(n: int, density: float) -> int:
    """How many of n entries are kept: density * n, rounded half to even, and at least one."""
    if n == 0 or density <= 0:
        return 0
    return min(n, max(1, round(density * n)))


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """Mark exactly the k largest entries: (n,) -> (n,) bool; none if k is not positive.

    If q of c entries that are tied at the threshold are marked, the j-th in index order is marked
    when floor((j + 1) q / c) > floor(j q / c): they are evenly spread. bfloat16 task vectors have
    many such ties; mergekit keeps an arbitrary subset of them.
    """
    import torch

    if k >= magnitudes.numel() or k <= 0:
        return magnitudes.new_full(magnitudes.shape, k > 0).bool()
    threshold = _kth_largest(magnitudes, k)
    marked = magnitudes > threshold
    tied = (magnitudes == threshold).nonzero().flatten()
    n_tied, n_wanted = len(tied), k - int(marked.sum())
    passed = torch.arange(n_tied + 1, device=tied.device) * n_wanted // n_tied
    marked[tied[passed[1:] > passed[:-1]]] = True
    return marked


def _kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th largest of (n,), 1 <= k <= n; on a CPU numpy is many times as fast as torch."""
    if magnitudes.device.type == "cpu":
        place = magnitudes.numel() - k
        return magnitudes.new_tensor(np.partition(magnitudes.numpy(), place)[place])
    return magnitudes.sort(descending=True).values[k - 1]


def trim(task_vector: Tensor, density: float, scale: Tensor | None = None) -> Tensor:
    """Keep exactly the `n_kept` entries of largest magnitude, times `scale`; set others to zero.

    mergekit rounds the number down.
    """
    magnitudes = task_vector.abs() if scale is None else task_vector.abs() * scale
    kept = largest(magnitudes.flatten(), n_kept(task_vector.numel(), density))
    return task_vector.where(kept.reshape(task_vector.shape), 0.0)


def rescaled(kept: Tensor, whole: Tensor) -> Tensor:
    """Scale the kept entries to the L1 norm of the whole task vector; zeros stay zeros."""
    length = total(kept.abs())
    return kept * (total(whole.abs()) / length) if length else kept


def trimmed(
    task_vectors: Tensor, densities: Sequence[float], scales: Sequence[Tensor | None]
) -> list[Tensor]:
    """Trim each of the task vectors: (n_sources, *shape)."""
    triples = zip(task_vectors, densities, scales, strict=True)
    return [trim(vector, density, scale) for vector, density, scale in triples]


def channel_scales(
    grams: Sequence[Tensor | None], trim: Trim, exponent: float, *, transposed: bool
) -> list[Tensor | None]:
    """Factors of the magnitudes of each task vector when it is trimmed; None: 1 everywhere.

    With `trim: activation` the factor is a power of the activation norm of the input that an entry
    is multiplied by, a_j = sqrt(E[x_j^2]): (in,), or (in, 1) if matrices are stored as (in, out).
    A stack of matrices has factors for each. A matrix of it that no token reached has their mean.
    """
    if trim == "magnitude":
        return [None] * len(grams)
    return [None if one is None else _factors(one, exponent, transposed) for one in grams]


def _factors(gram: Tensor, exponent: float, transposed: bool) -> Tensor:  # noqa: FBT001
    squares = gram.diagonal(dim1=-2, dim2=-1).flatten(-2)
    norms: Tensor = squares ** (exponent / 2)
    if gram.dim() == 4 and (reached := squares.any(dim=-1, keepdim=True)).any():
        norms = norms.where(reached, norms[reached.flatten()].mean())
    if transposed:
        return norms.unsqueeze(-1)
    return norms.unsqueeze(-2) if gram.dim() == 4 else norms


def drop(task_vector: Tensor, density: float, stream: int) -> Tensor:
    """Keep each entry with probability `density`, by its own random bits."""
    if density >= 1:
        return task_vector
    drawn = random_bits.halves(stream, task_vector.numel()) < random_bits.below(density)
    return task_vector.where(mask(drawn, task_vector), 0.0)


def mask(drawn: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
    """A mask from the CPU, in the shape of another tensor and on its device."""
    import torch

    return torch.from_numpy(drawn).to(like.device).reshape(like.shape)


def all_votes(votes: Sequence[Tensor], weights: Tensor, *, normalize: bool) -> Tensor:
    """Add the votes (weight times task vector), or divide their sum by that of the weights."""
    mixed = summed(votes, votes[0])
    total = summed(weights, weights[0])
    return mixed / total if normalize and abs(total) >= NEGLIGIBLE else mixed


def averaged(task_vectors: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
    """Return the weighted average of task vectors: (n_sources, *shape) -> (*shape)."""
    votes = [w * vector for w, vector in zip(weights, task_vectors, strict=True)]
    return all_votes(votes, weights, normalize=True)


def elected_votes(votes: Sequence[Tensor], weights: Tensor, *, normalize: bool) -> Tensor:
    """Elect a sign per entry, then add or average the votes that have it.

    A tie keeps no vote; mergekit counts it as positive. An average divides by the sum of the
    agreeing sources' weights.
    """
    elected = summed(votes, votes[0]).sign()
    agrees = [(vote.sign() == elected) & (vote != 0) for vote in votes]
    mixed = summed((v.where(a, 0.0) for v, a in zip(votes, agrees, strict=True)), votes[0])
    if not normalize:
        return mixed
    total = summed((w * a for w, a in zip(weights, agrees, strict=True)), votes[0])
    return mixed / total.where(total != 0, 1.0)
