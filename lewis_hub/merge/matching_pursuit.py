"""Orthogonal matching pursuit: a vector as a combination of a few others.

Tokens of a new tokenizer are written as combinations of tokens that two models share, as in
"Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit", arXiv 2506.06607.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lewis_hub.display import Advance
from lewis_hub.merge.runners import Runner
from lewis_hub.methods.numerics import LARGE, torch_threads

if TYPE_CHECKING:
    from torch import Tensor

N_TOGETHER = 64  # targets of one batch; the rounding depends on it
SMALL = 1e-6  # of a norm: what is left of a vector below it is rounding


@dataclass(frozen=True)
class Combinations:
    """Vectors as combinations of atoms: the sum of `coefficients` times the atoms of `indices`."""

    indices: Tensor  # (n, k) int64, of the atoms; of unused places 0
    coefficients: Tensor  # (n, k) float32; of unused places 0
    errors: Tensor  # (n,) float32: norm of what is left, as a share of the vector's


def pursue(
    targets: Tensor, atoms: Tensor, k: int, runner: Runner, advance: Advance
) -> Combinations:
    """Write each target as a combination of at most k atoms.

    In each step the atom with the largest inner product, in magnitude, with the residual is added
    and all coefficients are fitted anew by least squares. It ends early where the residual is only
    rounding, or where the atom depends on those before. The result does not depend on the number of
    threads.

    Args:
        targets: (n, width) float32.
        atoms: (n_atoms, width) float32.
        k: at least 1; more than `n_atoms` or `width` are of no use.
        runner: its threads share the batches.
        advance: called with the number of targets done.
    """
    import torch

    k = min(k, *atoms.shape)
    targets, atoms = _scaled(targets, atoms)

    def solve(first: int) -> Combinations:
        with torch_threads(1):
            return _pursue(targets[first : first + N_TOGETHER].clone(), atoms, k)

    parts = []
    for part in runner.map(solve, range(0, len(targets), N_TOGETHER)):
        parts.append(part)
        advance(len(part.errors))
    return Combinations(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat([part.errors for part in parts]),
    )


def _scaled(targets: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Both, times a power of two that keeps their squares in float32: coefficients stay equal."""
    largest = max(abs(float(end)) for values in (targets, atoms) for end in values.aminmax())
    if not largest or LARGE**-1 <= largest <= LARGE:
        return targets, atoms
    scale = math.ldexp(1.0, -math.frexp(largest)[1])
    return targets * scale, atoms * scale


def _pursue(targets: Tensor, atoms: Tensor, k: int) -> Combinations:
    """One batch; the chosen atoms of each target are Q R, with rows of `basis` as columns of Q."""
    import torch

    n, width = targets.shape
    each = torch.arange(n)
    indices = torch.zeros(n, k, dtype=torch.int64)
    basis = torch.zeros(n, k, width)
    upper = torch.eye(k).repeat(n, 1, 1)
    is_chosen = torch.zeros(n, len(atoms), dtype=torch.bool)
    residual, norms = targets.clone(), targets.norm(dim=1)
    goes_on = norms > 0
    for step in range(k):
        products = (residual @ atoms.T).abs_().masked_fill_(is_chosen, -1.0)
        chosen = products.argmax(dim=1)
        atom = atoms[chosen]
        rest, along = _orthogonal(atom, basis[:, :step])
        length = rest.norm(dim=1)
        goes_on &= length > SMALL * atom.norm(dim=1)
        goes_on &= residual.norm(dim=1) > SMALL * norms
        if not goes_on.any():
            break
        # where it has ended, the row of Q stays zero, and so does the coefficient
        indices[:, step] = chosen.where(goes_on, 0)
        upper[:, :step, step] = along * goes_on[:, None]
        upper[:, step, step] = length.where(goes_on, 1.0)
        basis[:, step] = rest / length.where(goes_on, 1.0)[:, None] * goes_on[:, None]
        is_chosen[each, chosen] = True
        share = (basis[:, step] * residual).sum(dim=1, keepdim=True)
        residual = residual - share * basis[:, step]
    parts = torch.bmm(basis, targets[:, :, None])
    coefficients = torch.linalg.solve_triangular(upper, parts, upper=True)[:, :, 0]
    left = (targets - torch.bmm(coefficients[:, None], atoms[indices])[:, 0]).norm(dim=1)
    return Combinations(indices, coefficients, left / norms.where(norms > 0, 1.0))


def _orthogonal(atom: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each atom that is orthogonal to its basis, and its coordinates in the basis.

    Gram-Schmidt twice, so that rounding leaves nothing of the basis in it.
    """
    import torch

    along = torch.zeros(basis.shape[:2])
    for _ in range(2):
        more = torch.bmm(basis, atom[:, :, None])[:, :, 0]
        atom = atom - torch.bmm(more[:, None], basis)[:, 0]
        along = along + more
    return atom, along
