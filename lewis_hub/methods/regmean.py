"""RegMean on task vectors: the matrix whose outputs are nearest to the outputs of all experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from lewis_hub.methods.numerics import cholesky, dot, product, solve
from lewis_hub.methods.registry import register
from lewis_hub.methods.votes import (
    TRIMS,
    Trim,
    averaged,
    channel_scales,
    elected_votes,
    trimmed,
)
from lewis_hub.methods.votes import trim as kept

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Literal["own", "merged", "merged_block"]
INPUTS = ("own", "merged", "merged_block")
Norm = Literal["none", "mean_diagonal", "frobenius"]
NORMS = ("none", "mean_diagonal", "frobenius")
Anchor = Literal["task_arithmetic", "ties", "base"]
ANCHORS = ("task_arithmetic", "ties", "base")
RIDGE = 1e-6  # times the mean second moment, added to the diagonal
LARGER_RIDGES = (1e-4, 1e-2)  # tried if the rounded moments are not positive definite with RIDGE


@register(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    accepted={"trim": TRIMS, "inputs": INPUTS, "normalize_grams": NORMS, "anchor": ANCHORS},
    uses_lapack=True,
    weighs_squares=True,
    version=5,
)
def regmean(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (out, in) float32; (in, out) if `transposed`; any shape without Grams
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) how much each source's own inputs count
    densities: Sequence[float],  # n_sources fractions kept, each in [0, 1]
    # n_sources second moments E[x x^T]: (n_parts, width, width); (n_matrices, ...) of a stack
    grams: Sequence[Tensor | None],
    cross_covariances: Sequence[Tensor | None] = (),  # n_sources E[z x^T]; empty: z is x
    residual_covariances: Sequence[Tensor | None] = (),  # n_sources E[d x^T]; empty: d is 0
    transposed: bool = False,
    off_diagonal: float = 0.5,  # alpha in the paper
    lambda_: float = 1.0,
    inputs: Inputs = "own",
    normalize_grams: Norm = "none",
    ridge: float = 0.0,  # lambda in FeatCal
    anchor: Anchor = "task_arithmetic",
    anchor_scale: float = 1.0,  # rho in FeatCal, times the scale of its first merge
    anchor_density: float = 0.5,  # of `anchor: ties`
    interpolation: float = 1.0,  # alpha in FeatCal
    prior: float = 0.0,  # share of the moments that the task vectors give
    compensate: bool = True,
    affine: bool = False,
    embeddings: bool = False,
    trim: Trim = "magnitude",
    trim_exponent: float = 1.0,
) -> Tensor:
    """Give each matrix the outputs that its experts give on their own calibration texts.

    The update X minimises the weighted squares of (X - task vector) x over the inputs x of each
    expert: X = (sum of w task_vector G) (sum of w G)^-1. The off-diagonal entries of G are
    multiplied by `off_diagonal`. RIDGE times the mean of the diagonal is added to the diagonal;
    it also decides for inputs that no token activates. Inputs that are longer than a Gram are
    solved part by part. If any source has no G for a tensor, its task vectors are averaged. A stack
    of matrices, such as the experts of a mixture in one tensor, is solved matrix by matrix; one
    whose G of some source is 0 is averaged.

    With `inputs: merged`, x is the input in the merged model, whose earlier matrices are merged
    already, and z the input in the expert: base + X minimises the weighted squares of
    (base + X) x - (base + task vector) z. With `residual_covariances`, (base + X) x also
    compensates d, the rest of the difference between the outputs of the expert's block and the
    merged block; each part of long inputs compensates an equal share of d. With `inputs:
    merged_block`, as in RegMean++ (arXiv 2508.03121), x = z is the input of the expert's matrix in
    the expert's block, which gets the hidden states of the merged model.

    `ridge` pulls the update towards A, `anchor_scale` times the update of another merge. `anchor`
    names it: `task_arithmetic` is the sum of the task vectors, each times its weight over the mean
    weight; `ties` keeps `anchor_density` of each task vector, and averages those that agree with
    the elected sign; `base` is 0.
    `normalize_grams` divides the moments of each expert by the mean of the diagonal of its G or by
    its Frobenius norm, and `ridge` is then added to the diagonal as it is; without, it is times the
    mean diagonal of the sum. A tensor without G becomes base + lambda A where `ridge` is set.
    With `prior` p, each expert's moments count 1 - p, and p those that WUDI-Merging (arXiv
    2503.08099) takes instead of data, v^T v of its own task vector, scaled to the trace of G. Few
    texts leave directions out that they give. 1 is `wudi`, but for the scale and the shrinkage.

    `interpolation` a takes a z + (1 - a) x instead of z, and a d instead of d; d is 0 without
    `compensate`. FeatCal (arXiv 2605.13030) is `inputs: merged` without `compensate`, with
    off_diagonal 1, `normalize_grams: frobenius` and, in its authors' code, ridge .05, anchor_scale
    .66 and interpolation .25. It fits all matrices of a block at once, and LayerNorms and biases,
    which `affine` fits here with `inputs: merged`: not in this function, which has a matrix alone.

    With `embeddings`, the tables of token embeddings are fitted too. Their inputs are one-hot, so G
    is diagonal, the share of each token in the texts, and is given as n_parts = vocabulary, width =
    1. A row is then the mean of the sources' rows, weighted by how often each source's texts have
    the token; the row of a token that no text has is averaged, or pulled to the anchor.

    Formula:
        merged = base + lambda (sum_i w_i v_i G_i + r A) (sum_i w_i G_i + r I)^-1
        G_i: E[x x^T] of the matrix's inputs on the calibration texts of expert i: in expert i, or,
            with `merged_block`, in its block on the hidden states of the merged model (RegMean++)
        r: `ridge`
        A: the anchor, anchor_scale sum_i (w_i / mean of w) v_i; 0 or that of `ties` by `anchor`

    Options:
        weight: how much the inputs of an expert count, relative to the others
        density: the fraction of entries of each task vector that are kept before the fit
        off_diagonal: the factor of the correlations between inputs
        inputs: where x is read: in each expert, in the merge as far as it is fitted, or in each
            expert's block on the merge's hidden states
        normalize_grams: what the moments of each expert are divided by
        anchor: the merge that `ridge` pulls towards
        anchor_density: the fraction of entries that the anchor `ties` keeps
        interpolation: the share of the expert's input in what a matrix is fitted to
        prior: the share of the second moments that the task vectors give
        compensate: with `inputs: merged`, whether a block's last matrix corrects the block's output
        affine: with `inputs: merged`, whether norms and biases are fitted too
        embeddings: whether rows of token embeddings are weighted by how often texts have the token
    """
    del affine  # see `lewis_hub.calibration.affine`
    if embeddings and all(gram is not None and gram.shape[-1] == 1 for gram in grams):
        trim = "magnitude"  # most tokens are in no text, so that their rows would have no rank
    scales = channel_scales(grams, trim, trim_exponent, transposed=transposed)
    vectors = trimmed(task_vectors, densities, scales)
    known = [gram for gram in grams if gram is not None]
    anchored = _anchored(vectors, weights, anchor, anchor_scale, anchor_density) if ridge else None
    if len(known) < len(vectors):
        return base + lambda_ * (averaged(vectors, weights) if anchored is None else anchored)
    crosses, residuals = (
        (cross_covariances, residual_covariances if compensate else ())
        if inputs == "merged"
        else ((), ())
    )
    moments = [
        _Moments(
            gram.to(base),
            None if cross is None else cross.to(base),
            None if residual is None else residual.to(base),
        )
        for gram, cross, residual in zip_longest(known, crosses, residuals)
    ]
    fit = _Fit(weights, off_diagonal, normalize_grams, ridge, interpolation, prior, embeddings)
    update = fit.update(base, vectors, moments, anchored, transposed=transposed)
    return base + lambda_ * update


@register(
    "wudi",
    paper="https://arxiv.org/abs/2503.08099",
    uses_lapack=True,
    makes_squares=True,
    weighs_squares=True,
    version=2,
)
def wudi(  # noqa: PLR0913 (options are keywords)
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    weights: Tensor,  # (n_sources,) how much each source's own inputs count
    ridge: float = 0.1,
    anchor_scale: float = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Do what `regmean` does without data: the rows of a task vector stand for its inputs.

    WUDI-Merging minimises the interference of what the merge adds with the rows of each task
    vector by gradient descent from their sum, and stops early. This is the stationary point with a
    `ridge` towards that sum instead, which also leaves directions alone that matter to no task
    vector. Only matrices are solved; other tensors become the anchor. See `regmean` for `ridge`
    and `anchor_scale`.

    Formula:
        merged = base + lambda (sum_i w_i v_i G_i + r A) (sum_i w_i G_i + r I)^-1
        G_i = v_i^T v_i / |v_i|^2, by the Frobenius norm
        r: `ridge` times the mean diagonal of the sum; A = anchor_scale sum_i (w_i / mean of w) v_i

    Options:
        weight: how much a task vector counts, relative to the others
    """
    grams: list[Tensor | None] = [None] * len(task_vectors)
    if base.dim() == 2 and base.numel():
        squares = [dot(v, v) for v in task_vectors]
        grams = [
            (product(v.T, v) / square if square > 0 else product(v.T, v))[None]
            for v, square in zip(task_vectors, squares, strict=True)
        ]
    return regmean(
        base,
        task_vectors,
        weights=weights,
        densities=[1.0] * len(task_vectors),
        grams=grams,
        off_diagonal=1.0,
        lambda_=lambda_,
        ridge=max(ridge, RIDGE),
        anchor_scale=anchor_scale,
    )


def _anchored(
    vectors: Sequence[Tensor], weights: Tensor, anchor: Anchor, scale: float, density: float
) -> Tensor:
    """The update of the merge that the ridge pulls towards."""
    if anchor == "base":
        return vectors[0].new_zeros(vectors[0].shape)
    if anchor == "ties":
        votes = [w * kept(v, density) for w, v in zip(weights, vectors, strict=True)]
        return scale * elected_votes(votes, weights, normalize=True)
    return scale * len(vectors) * averaged(vectors, weights)


@dataclass(frozen=True)
class _Moments:
    """Moments of one source: of the inputs of a matrix, of a part of them, or of a stack."""

    gram: Tensor  # E[x x^T], (..., width, width)
    cross: Tensor | None  # E[z x^T], (..., width, width); None: z is x
    residual: Tensor | None  # E[d x^T], (..., out, width); None: d is 0

    def at(self, number: int) -> _Moments:
        """Those of one matrix of a stack, or of one part of the inputs."""
        cross = None if self.cross is None else self.cross[number]
        residual = None if self.residual is None else self.residual[number]
        return _Moments(self.gram[number], cross, residual)

    def parts(self) -> list[_Moments]:
        """Those of each part, with its share of d."""
        n_parts = len(self.gram)
        shared = None if self.residual is None else self.residual / n_parts
        whole = replace(self, residual=shared)
        return [whole.at(number) for number in range(n_parts)]


@dataclass(frozen=True)
class _Pull:
    """The ridge that pulls an update towards the anchor's."""

    ridge: float
    anchor: Tensor  # (out, width), minus base
    relative: bool  # `ridge` is times the mean diagonal

    def strength(self, diagonal: Tensor) -> float:
        """Return what is added to the diagonal of the sum of the Grams."""
        scale = float(diagonal.double().mean()) if self.relative else 1.0
        return self.ridge * scale


@dataclass(frozen=True)
class _Fit:
    """How a tensor is fitted; the options are those of `regmean`."""

    weights: Tensor
    off_diagonal: float
    norm: Norm
    ridge: float
    interpolation: float
    prior: float
    embeddings: bool

    def update(
        self,
        base: Tensor,
        vectors: Sequence[Tensor],
        moments: Sequence[_Moments],
        anchor: Tensor | None,
        *,
        transposed: bool,
    ) -> Tensor:
        """The update of a matrix, or of each matrix of a stack."""
        import torch

        if base.dim() == 3:
            each = []
            for number, matrix in enumerate(base):
                of_sources = [one.at(number) for one in moments]
                own = [vector[number] for vector in vectors]
                pull = None if anchor is None else anchor[number]
                if all(one.gram.any() for one in of_sources):
                    each.append(self.update(matrix, own, of_sources, pull, transposed=transposed))
                else:  # no token of some source reached it
                    each.append(averaged(torch.stack(own), self.weights) if pull is None else pull)
            return torch.stack(each)
        if transposed:
            vectors, anchor = [one.T for one in vectors], None if anchor is None else anchor.T
            return self._of_rows(base.T, vectors, moments, anchor).T
        return self._of_rows(base, vectors, moments, anchor)

    def _of_rows(
        self,
        base: Tensor,
        vectors: Sequence[Tensor],
        moments: Sequence[_Moments],
        anchor: Tensor | None,
    ) -> Tensor:
        """The update of a matrix (out, in), part by part of its inputs."""
        n_parts, width = moments[0].gram.shape[:2]
        if self.embeddings and width == 1 and not any(one.cross is not None for one in moments):
            squares = [one.gram.flatten() for one in moments]
            return self._uncorrelated(vectors, squares, self._pull(anchor))
        update = base.new_empty(base.shape)
        each = zip(*(one.parts() for one in moments), strict=True)
        for number, of_part in enumerate(each):
            part = slice(number * width, (number + 1) * width)
            rows = [vector[:, part] for vector in vectors]
            found = [_interpolated(one, self.interpolation) for one in of_part]
            if self.prior:
                pairs = zip(found, rows, strict=True)
                found = [_with_prior(one, row, self.prior) for one, row in pairs]
            found = [_normalized(one, self.norm) for one in found]
            pull = self._pull(None if anchor is None else anchor[:, part])
            update[:, part] = _nearest(
                [base[:, part], *rows], found, self.weights, self.off_diagonal, pull
            )
        return update

    def _pull(self, anchor: Tensor | None) -> _Pull | None:
        return None if anchor is None else _Pull(self.ridge, anchor, relative=self.norm == "none")

    def _uncorrelated(
        self, vectors: Sequence[Tensor], squares: Sequence[Tensor], pull: _Pull | None
    ) -> Tensor:
        """The update (out, in) where each G is diagonal; `squares` of each source are (in,)."""
        found = []
        for vector, square in zip(vectors, squares, strict=True):
            own, size = square, dot(vector, vector)
            if self.prior and size > 0:
                of_rows = vector.square().sum(dim=0) / size * square.sum()
                own = (1.0 - self.prior) * square + self.prior * of_rows
            divisor = own.mean() if self.norm == "mean_diagonal" else own.norm()
            if self.norm != "none" and divisor > 0:
                own = own / divisor
            mean = own.mean()
            found.append(own + RIDGE * mean.where(mean > 0, 1.0))
        total = _weighted(found, self.weights)
        target = _weighted((v * s for v, s in zip(vectors, found, strict=True)), self.weights)
        pulled = pull.strength(total) if pull else 0.0
        if pull:
            target += pulled * pull.anchor
        return target / (total + pulled)


def _interpolated(moments: _Moments, share: float) -> _Moments:
    """Moments with share z + (1 - share) x instead of z, and share d instead of d."""
    if share == 1.0 or moments.cross is None:
        return moments
    residual = None if moments.residual is None else share * moments.residual
    cross = share * moments.cross + (1.0 - share) * moments.gram
    return _Moments(moments.gram, cross, residual)


def _with_prior(moments: _Moments, vector: Tensor, share: float) -> _Moments:
    """Moments mixed with those of the task vector's rows as inputs, of the same trace."""
    gram, size = moments.gram, dot(vector, vector)
    if not size > 0:
        return moments
    scale = share * float(gram.diagonal().double().sum()) / size
    of_rows = scale * product(vector.T, vector)
    crosses = (
        None if moments.cross is None else (1.0 - share) * moments.cross + of_rows,
        None if moments.residual is None else (1.0 - share) * moments.residual,
    )
    return _Moments((1.0 - share) * gram + of_rows, *crosses)


def _normalized(moments: _Moments, norm: Norm) -> _Moments:
    """Moments divided by a norm of the Gram; as they are if it is 0."""
    if norm == "none":
        return moments
    flat = moments.gram.double()
    size = float(flat.diagonal().mean()) if norm == "mean_diagonal" else math.sqrt(dot(flat, flat))
    if not size > 0:
        return moments
    crosses = (None if one is None else one / size for one in (moments.cross, moments.residual))
    return _Moments(moments.gram / size, *crosses)


@dataclass(frozen=True)
class _Factored:
    """The left side of the equation of all sources."""

    total: Tensor  # sum of w G, shrunk, without the pull
    lower: Tensor  # the Cholesky factor of `total` with the pull
    pulled: float  # what the pull adds to the diagonal
    ridge: float  # the ridge of each G


def _factored(
    moments: Sequence[_Moments], weights: Tensor, off_diagonal: float, pull: _Pull | None
) -> _Factored | None:
    """None if the sum is not positive definite: the moments of huge task vectors overflow."""
    import torch

    for ridge in (RIDGE, *LARGER_RIDGES):
        grams = (_shrunk(one.gram, one.gram, off_diagonal, ridge) for one in moments)
        total = _weighted(grams, weights)
        pulled = pull.strength(total.diagonal()) if pull else 0.0
        shifted = total.to(torch.float64, copy=True)
        shifted.diagonal().add_(pulled)
        if (lower := cholesky(shifted)) is not None:
            return _Factored(total, lower, pulled, ridge)
    return None


def _nearest(
    rows: Sequence[Tensor],
    moments: Sequence[_Moments],
    weights: Tensor,
    off_diagonal: float,
    pull: _Pull | None,
) -> Tensor:
    """X with X (sum of w G + r I) = sum of w (rows C + base (C - G)) + r anchor, and residuals.

    G and C are shrunk and have a ridge. `rows` are the base's, then those of each source. X is NaN
    if the sum of w G is not positive definite, as weights are positive and moments finite.
    """
    base, *vectors = rows
    left = _factored(moments, weights, off_diagonal, pull)
    if left is None:
        return base.new_full(base.shape, math.nan)
    target, change = base.new_zeros(base.shape), -left.total
    for w, vector, one in zip(weights, vectors, moments, strict=True):
        cross = one.gram if one.cross is None else one.cross
        cross = _shrunk(cross, one.gram, off_diagonal, left.ridge)
        target += w * product(vector, cross)
        change += cross.mul_(w)
    if any(one.cross is not None for one in moments):
        target += product(base, change)
    if pull:
        target += left.pulled * pull.anchor
    update = solve(target, left.lower)
    has_residuals = any(one.residual is not None for one in moments)
    return update + _residual_update(moments, weights, left.lower) if has_residuals else update


def _residual_update(moments: Sequence[_Moments], weights: Tensor, lower: Tensor) -> Tensor:
    """X with X (sum of w G) = sum of w D, scaled to minimise the squares of X x - d.

    `lower` is the factor of shrunk G. With it correlated inputs would each compensate the same
    residual, too often if off-diagonal entries count little. The scale is in [0, 1].
    """
    known = [(w, one.residual) for w, one in zip(weights, moments, strict=True)]
    residuals = [(w, residual) for w, residual in known if residual is not None]
    residual = _weighted((one for _, one in residuals), [w for w, _ in residuals])
    update = solve(residual, lower)
    gram = _weighted((one.gram for one in moments), weights)
    squares = dot(product(update, gram), update)
    best = dot(residual, update) / squares if squares > 0 else 0.0
    return min(max(best, 0.0), 1.0) * update


def _weighted(terms: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """The sum of tensors times their weights, in order; one of them at a time is in memory."""
    first, *rest = weights
    terms = iter(terms)
    total = first * next(terms)
    for weight, term in zip(rest, terms, strict=True):
        total += weight * term
    return total


def _shrunk(matrix: Tensor, gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """A copy with scaled off-diagonal entries, plus `ridge` times the mean diagonal of `gram`."""
    mean = gram.diagonal().double().mean().to(gram.dtype)
    shrunk = off_diagonal * matrix
    shrunk.diagonal().copy_(matrix.diagonal() + ridge * mean.where(mean > 0, 1.0))
    return shrunk
