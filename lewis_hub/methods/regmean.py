"""RegMean on task vectors: the matrix whose outputs are nearest to those of all experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lewis_hub.methods.combine import summed
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import TRIMS, Trim, channel_scales, trimmed
from lewis_hub.methods.systems import factor, product, solve

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6  # of the mean second moment, on the diagonal
LARGER_RIDGES = (1e-4, 1e-2)  # where rounded moments are not positive definite with it


@register("regmean", paper="https://arxiv.org/abs/2212.09849", accepted={"trim": TRIMS})
def regmean(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (out, in) float32; (in, out) where `transposed`; any shape without Grams
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) how much each source's own inputs count
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    grams: Sequence[Tensor | None],  # n_sources second moments E[x x^T]: (n_parts, width, width)
    transposed: bool = False,
    off_diagonal: float = 0.5,  # alpha in the paper
    lambda_: float = 1.0,
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Give each matrix the outputs that its experts give on their own calibration texts.

    The update X minimises the weighted squares of (X - task vector) x over the inputs x that each
    expert itself sees: X = (sum of w G task vector) / (sum of w G). The entries of G off the
    diagonal count `off_diagonal` of what they are. RIDGE times its mean diagonal is added, which
    also decides for inputs that no token ever drove. Long inputs go part by part.
    A tensor of which any source has no G takes the weighted average of the task vectors.
    """
    scales = channel_scales(grams, trim, trim_exponent, transposed=transposed)
    vectors = trimmed(task_vectors, densities, scales)
    known = [gram for gram in grams if gram is not None]
    if len(known) < len(vectors):
        mixed = summed((w * v for w, v in zip(weights, vectors, strict=True)), base)
        return base + lambda_ * mixed / summed(weights, weights[0])
    rows = [vector.T if transposed else vector for vector in vectors]
    solved = base.new_empty(rows[0].shape)
    width = known[0].shape[-1]
    for number in range(len(known[0])):
        part = slice(number * width, (number + 1) * width)
        moments = [gram[number].to(base) for gram in known]
        solved[:, part] = _nearest([row[:, part] for row in rows], moments, weights, off_diagonal)
    return base + lambda_ * (solved.T if transposed else solved)


def _nearest(
    rows: Sequence[Tensor], moments: Sequence[Tensor], weights: Tensor, off_diagonal: float
) -> Tensor:
    """X with X (sum of w G) = sum of w (rows G), G being shrunk and with its ridge."""
    for ridge in (RIDGE, *LARGER_RIDGES):
        shrunk = [_shrunk(gram, off_diagonal, ridge) for gram in moments]
        total = summed((w * g for w, g in zip(weights, shrunk, strict=True)), shrunk[0])
        if found := factor(total):
            triples = zip(weights, rows, shrunk, strict=True)
            return solve(summed((w * product(r, g) for w, r, g in triples), rows[0]), found)
    raise AssertionError("weights are positive and moments are, up to rounding")


def _shrunk(gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """Drawn to its diagonal."""
    diagonal = gram.diagonal()
    mean = diagonal.double().mean().to(gram.dtype)
    found = off_diagonal * gram
    found.diagonal().copy_(diagonal + ridge * mean.where(mean > 0, 1.0))
    return found
