"""RegMean on task vectors: the matrix whose outputs are nearest to those of all experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, NamedTuple

from lewis_hub.methods.combine import all_votes, summed
from lewis_hub.methods.numerics import Factor, factor, product, solve
from lewis_hub.methods.registry import register
from lewis_hub.methods.sparsify import TRIMS, Trim, channel_scales, trimmed

if TYPE_CHECKING:
    from torch import Tensor


Inputs = Literal["own", "merged"]
INPUTS = ("own", "merged")
RIDGE = 1e-6  # of the mean second moment, on the diagonal
LARGER_RIDGES = (1e-4, 1e-2)  # where rounded moments are not positive definite with it


@register(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    accepted={"trim": TRIMS, "inputs": INPUTS},
    version=2,
)
def regmean(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (out, in) float32; (in, out) where `transposed`; any shape without Grams
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) how much each source's own inputs count
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    grams: Sequence[Tensor | None],  # n_sources second moments E[x x^T]: (n_parts, width, width)
    crosses: Sequence[Tensor | None] = (),  # n_sources E[z x^T], as long; none at all: z is x
    gaps: Sequence[Tensor | None] = (),  # n_sources E[d x^T]: (n_parts, out, width); none: d is 0
    transposed: bool = False,
    off_diagonal: float = 0.5,  # alpha in the paper
    lambda_: float = 1.0,
    inputs: Inputs = "own",
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Give each matrix the outputs that its experts give on their own calibration texts.

    The update X minimises the weighted squares of (X - task vector) x over the inputs x that each
    expert itself sees: X = (sum of w G task vector) / (sum of w G). The entries of G off the
    diagonal count `off_diagonal` of what they are. RIDGE times its mean diagonal is added, which
    also decides for inputs that no token ever drove. Long inputs go part by part.
    A tensor of which any source has no G takes the weighted average of the task vectors.

    With `inputs: merged` x is what the merged model itself is handed there, whose earlier matrices
    are merged already, and z what the expert is: base + X minimises the weighted squares of
    (base + X) x - (base + task vector) z. RegMean++ (arXiv 2508.03121) takes x from the merged
    model too, and z = x. Where `gaps` are known, (base + X) x is to make up for d as well: for what
    the merged model's block lacks beside. Of that each part of long inputs takes an equal share.
    """
    scales = channel_scales(grams, trim, trim_exponent, transposed=transposed)
    vectors = trimmed(task_vectors, densities, scales)
    known = [gram for gram in grams if gram is not None]
    if len(known) < len(vectors):
        votes = [w * vector for w, vector in zip(weights, vectors, strict=True)]
        return base + lambda_ * all_votes(votes, weights, normalize=True)
    rows = [vector.T if transposed else vector for vector in vectors]
    solved = base.new_empty(rows[0].shape)
    width, still = known[0].shape[-1], base.T if transposed else base
    apart, lacking = (crosses, gaps) if inputs == "merged" else ((), ())
    n_parts = len(known[0])
    for number in range(n_parts):
        part = slice(number * width, (number + 1) * width)
        moments = [
            _Moments(
                gram[number].to(base),
                None if cross is None else cross[number].to(base),
                None if gap is None else gap[number].to(base) / n_parts,
            )
            for gram, cross, gap in zip_longest(known, apart, lacking)
        ]
        parts = [still[:, part], *(row[:, part] for row in rows)]
        solved[:, part] = _nearest(parts, moments, weights, off_diagonal)
    return base + lambda_ * (solved.T if transposed else solved)


class _Moments(NamedTuple):
    """Of a source: E[x x^T]; E[z x^T], None: z is x; a part's share of E[d x^T], None: d is 0."""

    gram: Tensor
    cross: Tensor | None
    gap: Tensor | None


def _nearest(
    rows: Sequence[Tensor], moments: Sequence[_Moments], weights: Tensor, off_diagonal: float
) -> Tensor:
    """X with X (sum of w G) = sum of w (rows C + base (C - G)), G and C shrunk and with a ridge.

    And what mends the gaps. `rows` are the base's, then each source's.
    """
    base, *vectors = rows
    for ridge in (RIDGE, *LARGER_RIDGES):
        shrunk = [_shrunk(one.gram, one.gram, off_diagonal, ridge) for one in moments]
        total = summed((w * g for w, g in zip(weights, shrunk, strict=True)), shrunk[0])
        if found := factor(total):
            wanted = (
                w * _wanted(base, vector, gram, one, off_diagonal, ridge)
                for w, vector, gram, one in zip(weights, vectors, shrunk, moments, strict=True)
            )
            nearest = solve(summed(wanted, base), found)
            gaps = [one.gap for one in moments if one.gap is not None]
            return nearest + _mending(gaps, moments, weights, found) if gaps else nearest
    raise AssertionError("weights are positive and moments are, up to rounding")


def _wanted(  # noqa: PLR0913
    base: Tensor,
    vector: Tensor,
    gram: Tensor,
    moments: _Moments,
    off_diagonal: float,
    ridge: float,
) -> Tensor:
    """What X G has to be for a source alone; `gram` is shrunk."""
    if moments.cross is None:
        return product(vector, gram)
    cross = _shrunk(moments.cross, moments.gram, off_diagonal, ridge)
    return product(vector, cross) + product(base, cross - gram)


def _mending(
    gaps: Sequence[Tensor], moments: Sequence[_Moments], weights: Tensor, found: Factor
) -> Tensor:
    """X with X (sum of w G) = sum of w D, as much of it as leaves the least of d.

    `found` is of shrunk G, by which correlated inputs would each make up for the same: times too
    much where they count little. So X is scaled to the smallest squares of X x - d, never up.
    """
    missing = summed((w * gap for w, gap in zip(weights, gaps, strict=True)), gaps[0])
    gram = summed((w * m.gram for w, m in zip(weights, moments, strict=True)), moments[0].gram)
    update = solve(missing, found)
    squares = _inner(product(update, gram), update)
    best = _inner(missing, update) / squares if squares > 0 else 0.0
    return min(max(best, 0.0), 1.0) * update


def _inner(one: Tensor, two: Tensor) -> float:
    """Sum of products, in numpy: torch's differs by the number of threads."""
    return float((one * two).double().cpu().numpy().sum())


def _shrunk(matrix: Tensor, gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """Drawn to its diagonal, to which `ridge` times the mean diagonal of `gram` is added."""
    mean = gram.diagonal().double().mean().to(gram.dtype)
    found = off_diagonal * matrix
    found.diagonal().copy_(matrix.diagonal() + ridge * mean.where(mean > 0, 1.0))
    return found
