"""Match the blocks of models of different depth: segment-wise model alignment (SMA).

Xu et al., "Training-free Heterogeneous Model Merging", arXiv:2501.00061. C[k, l] is the similarity
of block k of the shallower model and block l of the deeper one: in the paper the linear CKA of what
the blocks put out on the same tokens, here w times the mean cosine of their matrices plus 1 - w
times CKA. Where weights cannot be compared, it is the CKA of what blocks add to the hidden state:
their outputs hold what all blocks before them added, and are alike. Each block k gets a block A[k]
of the deeper model, in the same order, so that the sum of C[k, A[k]] is the highest:

    F[k, l] = max(F[k, l - 1], F[k - 1, l - 1] + C[k, l])

Block A[k] is the last of a segment of the deeper model. The others in the segment are matched with
no block. The same recursion, with distances, aligns layers in CLAFusion (arXiv:2110.15538).

CKA (arXiv:1905.00414) of X and Y, (tokens, units) with columns of mean zero, is
‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms. It is computed from the products over tokens, X Xᵀ
and Y Yᵀ. The paper's code has another estimate of it, on images in batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lewis_hub.methods.numerics import in_range, torch_threads

PIECE = 1 << 16  # products that are multiplied at a time, of all blocks

Similarity = npt.NDArray[np.float64]  # (blocks of one model, blocks of the other)


def linear_cka(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Similarity:
    """The linear CKA of each of our blocks with each of theirs; 0 if one is a constant.

    Args:
        ours: the outputs or updates of each block, (tokens, units); one is held at a time, but the
            products over tokens of all blocks are.
        theirs: those of the other model, on the same tokens.
    """
    with torch.no_grad(), torch_threads(1):  # on any number of threads the sums are the same
        own, other = ([_over_tokens(seen) for seen in side] for side in (ours, theirs))
        dots = torch.zeros(len(own), len(other), dtype=torch.float64)
        for start in range(0, len(own[0]), PIECE):
            pieces = (torch.stack([p[start : start + PIECE] for p in s]) for s in (own, other))
            left, right = (piece.double() for piece in pieces)
            dots += left @ right.T
    return np.asarray(dots.numpy(), np.float64)


def weight_cosines(matrices: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> Similarity:
    """The cosine of each of our blocks with each of theirs, a mean over the matrices of a block.

    Args:
        matrices: of each matrix its pieces: (our blocks, entries) and (their blocks, entries). A
            matrix of zeros has the cosine 0 with any.
    """
    found = []
    with torch.no_grad(), torch_threads(1):
        for pieces in matrices:
            dots, ours, theirs = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for own, other in ((one.double(), two.double()) for one, two in pieces):
                dots = dots + own @ other.T
                ours, theirs = ours + own.square().sum(dim=1), theirs + other.square().sum(dim=1)
            lengths = torch.outer(ours.sqrt(), theirs.sqrt())
            found.append((dots / lengths.where(lengths > 0, 1)).numpy())
    return np.asarray(np.mean(found, axis=0), np.float64)


def align_segments(similarity: Similarity) -> tuple[int, ...]:
    """The block A[k] of the deeper model for each block k of the shallower one.

    Similarities count in millionths: the last digits differ from processor to processor. Of
    alignments with the same sum, blocks nearer to the embeddings are taken.

    Args:
        similarity: C of the formula, (n_shallow, n_deep), with n_shallow <= n_deep.
    """
    n_shallow, n_deep = similarity.shape
    similarity = np.rint(1e6 * similarity)  # whole numbers, so that equal sums are equal
    best = np.full((n_shallow + 1, n_deep + 1), -np.inf)  # F; k and l count from 1
    best[0] = 0
    for k in range(1, n_shallow + 1):
        for end in range(k, n_deep + 1):
            matched = best[k - 1, end - 1] + similarity[k - 1, end - 1]
            best[k, end] = max(best[k, end - 1], matched)
    found, end = [], n_deep
    for k in range(n_shallow, 0, -1):
        while end > k and best[k, end - 1] == best[k, end]:
            end -= 1
        end -= 1
        found.append(end)
    return tuple(reversed(found))


def match_blocks(similarity: Similarity) -> tuple[int | None, ...]:
    """The block of the other model for each block of the reference; None: it has none.

    Args:
        similarity: (blocks of the reference, blocks of the other model).
    """
    n_reference, n_other = similarity.shape
    if n_reference <= n_other:
        return align_segments(similarity)
    blocks: list[int | None] = [None] * n_reference
    for number, place in enumerate(align_segments(similarity.T)):
        blocks[place] = number
    return tuple(blocks)


def _over_tokens(seen: Tensor) -> Tensor:
    """The products of all pairs of rows, whose columns have mean zero, as a vector of length 1."""
    centred = in_range(seen.double() - seen.double().mean(dim=0)).float()
    products = (centred @ centred.T).flatten()
    length = float(products.double().norm())
    return products / (length or 1.0)
