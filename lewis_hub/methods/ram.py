"""RAM: average the entries that several experts changed, keep those that only one changed.

Reinforcement learning changes few entries, and different ones for different skills. A mean over all
experts dilutes what only one of them learnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.methods.numerics import summed
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "https://arxiv.org/abs/2601.13572"
CHANGED = 1e-5  # an entry of a task vector counts as changed above this magnitude; as in mergekit


@register("ram", paper=PAPER)
def ram(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    epsilon: float = CHANGED,
) -> Tensor:
    """Add the mean of the experts that changed an entry by more than `epsilon`.

    With c experts that changed an entry, the result is base + (sum of their task vectors) / c, and
    the base where c is 0. An expert alone counts in full.

    Formula:
        merged = base + (sum over i in C of v_i) / |C|, base where C is empty
        C: for each entry, the i with |v_i| > epsilon

    Options:
        epsilon: the difference from the base above which an entry has changed
    """
    changed = task_vectors.abs() > epsilon
    n_changed = summed((one.to(base.dtype) for one in changed), base)
    kept = (v.where(one, 0.0) for v, one in zip(task_vectors, changed, strict=True))
    return base + summed(kept, base) / n_changed.clamp(min=1)


@register("ramplus_tl", paper=PAPER)
def ramplus_tl(
    base: Tensor,  # (*shape) float32
    task_vectors: Tensor,  # (n_sources, *shape) float32, source minus base
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = CHANGED,
) -> Tensor:
    """Do the same as `ram`, and enlarge what an expert alone changed.

    Of expert i's changed entries s_i are also changed by others and u_i are not. These u_i entries
    are multiplied by 1 + r min(s_i / u_i, alpha), because the average weakens the others. The
    counts are those of one tensor; in the paper's RAM+ they are those of the whole model.

    Formula:
        merged = base + (sum over i in C of f_i v_i) / |C|, base where C is empty
        C: for each entry, the i with |v_i| > epsilon
        f_i = 1 + r min(s_i / u_i, alpha) where C is {i} alone, 1 elsewhere
        s_i, u_i: number of entries of v_i where C is {i} and others, {i} alone

    Options:
        r: how much entries that one expert alone changed are enlarged
        alpha: the limit of s_i / u_i
        epsilon: the difference from the base above which an entry has changed
    """
    changed = task_vectors.abs() > epsilon
    n_changed = summed((one.to(base.dtype) for one in changed), base)
    votes = []
    for vector, one in zip(task_vectors, changed, strict=True):
        n_shared = int((one & (n_changed > 1)).sum())
        n_own = int((one & (n_changed == 1)).sum())
        factor = 1 + r * min(max(n_shared / max(n_own, epsilon), 0.0), alpha)
        shared = vector / n_changed.clamp(min=1)
        votes.append((factor * vector).where(n_changed == 1, shared).where(one, 0.0))
    return base + summed(votes, base)
