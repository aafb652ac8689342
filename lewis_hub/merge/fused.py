"""Which methods have a fused kernel, and its arguments for one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lewis_hub.merge.operands import (
    BLOCK,
    DRAW,
    KEEP_ALL,
    KEEP_NONE,
    RANK,
    TRIM,
    Experts,
    Mix,
    Table,
)
from lewis_hub.merge.plan import TensorPlan
from lewis_hub.methods import random_bits
from lewis_hub.methods.combine import NEGLIGIBLE
from lewis_hub.methods.della import allowances
from lewis_hub.methods.sparsify import n_kept


@dataclass(frozen=True)
class Fused:
    """A method in the kernel's terms, of tensors without second moments."""

    thins: int  # KEEP_ALL, TRIM, DRAW or RANK
    elects: bool
    averages: bool = False  # whatever the options say


FUSED = {
    "task_arithmetic": Fused(KEEP_ALL, elects=False),
    "ties": Fused(TRIM, elects=True),
    "dare_linear": Fused(DRAW, elects=False),
    "dare_ties": Fused(DRAW, elects=True),
    "della_linear": Fused(RANK, elects=False),
    "della": Fused(RANK, elects=True),
    "regmean": Fused(TRIM, elects=False, averages=True),
}
AVERAGED = "linear"
NO_TABLE = Table(np.zeros((0, 0), np.uint64), np.zeros((0, 0), np.float32))
LONGEST_ROW = 1 << 20  # of a longer one the ranks are left to the definition


def block_of(method: str, tensor: TensorPlan) -> int:
    """How many entries of a tensor have to be worked on together: a row where ranks count."""
    ranked = method in FUSED and FUSED[method].thins == RANK and tensor.weights
    return row_of(tensor) if ranked else BLOCK


def row_of(tensor: TensorPlan) -> int:
    """The entries along the last dimension; a 0-d tensor has one."""
    return max(1, tensor.output.shape[-1]) if tensor.output.shape else 1


def is_fused(method: str, tensor: TensorPlan) -> bool:
    """Whether a kernel can make the tensor: it knows magnitudes, and no activations."""
    if method not in FUSED or tensor.grams or block_of(method, tensor) > LONGEST_ROW:
        return False
    return FUSED[method].thins != TRIM or not tensor.options.get("rescale")


def experts_of(tensor: TensorPlan, fused: Fused) -> Experts:
    """The kernel's view of a plan; thresholds and ties are not known yet."""
    n = len(tensor.weights)
    densities = tensor.densities or (1.0,) * n
    rescales = tensor.options.get("rescale", False)
    factors = [1 / d if rescales and 0 < d < 1 else 1.0 for d in densities]
    return Experts(
        modes=np.array([_mode(fused, d, tensor.output.n_elements) for d in densities], np.int64),
        weights=np.array(tensor.weights, np.float32),
        thresholds=np.zeros(n, np.float32),
        ties=np.zeros((n, 3), np.int64),
        streams=np.array(tensor.streams or (0,) * n, np.uint64),
        below=np.array([random_bits.below(d) for d in densities], np.uint64),
        factors=np.array(factors, np.float32),
        table=_table(tensor, densities, rescales=rescales) if fused.thins == RANK else NO_TABLE,
    )


def _table(tensor: TensorPlan, densities: Sequence[float], *, rescales: bool) -> Table:
    found = [
        allowances(row_of(tensor), density, spread, rescale=rescales)
        for density, spread in zip(densities, tensor.own["spreads"], strict=True)
    ]
    return Table(
        np.stack([below for below, _ in found]),
        np.stack([factors for _, factors in found]).astype(np.float32),
    )


def mix_of(tensor: TensorPlan, fused: Fused) -> Mix:
    """How the votes of the experts are combined."""
    normalize = fused.averages or bool(tensor.options["normalize"])
    total = _in_order(tensor.weights)
    divides = normalize and abs(total) >= np.float32(NEGLIGIBLE)
    return Mix(
        elects=fused.elects,
        normalize=normalize,
        divisor=total if divides else np.float32(1),
        scale=np.float32(tensor.options["lambda"]),
    )


def divisor_of(tensor: TensorPlan) -> np.float32:
    """What a weighted sum of models is divided by."""
    return _in_order(tensor.weights) if tensor.options["normalize"] else np.float32(1)


def _mode(fused: Fused, density: float, n_elements: int) -> int:
    if fused.thins == TRIM:
        k = n_kept(n_elements, density)
        return KEEP_ALL if k == n_elements else TRIM if k else KEEP_NONE
    if fused.thins == RANK:
        return KEEP_ALL if density >= 1 else RANK
    if fused.thins == DRAW:
        return KEEP_ALL if density >= 1 else DRAW if random_bits.below(density) else KEEP_NONE
    return KEEP_ALL


def _in_order(weights: Sequence[float]) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total += np.float32(weight)
    return total
