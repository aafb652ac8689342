"""Which methods have a fused kernel, and its arguments for one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lewis_hub.merge import kernels
from lewis_hub.merge.kernels import DRAW, KEEP_ALL, KEEP_NONE, TRIM, Experts, Mix
from lewis_hub.merge.plan import TensorPlan
from lewis_hub.methods import random_bits
from lewis_hub.methods.combine import NEGLIGIBLE
from lewis_hub.methods.sparsify import n_kept


@dataclass(frozen=True)
class Fused:
    """A method in the kernel's terms."""

    thins: int  # KEEP_ALL, TRIM or DRAW
    elects: bool


FUSED = {
    "task_arithmetic": Fused(KEEP_ALL, elects=False),
    "ties": Fused(TRIM, elects=True),
    "dare_linear": Fused(DRAW, elects=False),
    "dare_ties": Fused(DRAW, elects=True),
}
AVERAGED = "linear"


@dataclass(frozen=True)
class Cut:
    """Where one expert's task vector is trimmed."""

    high: int  # the high bits of the threshold
    n_above: int  # entries whose high bits are larger


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
    )


def mix_of(tensor: TensorPlan, fused: Fused) -> Mix:
    """How the votes of the experts are combined."""
    normalize = bool(tensor.options["normalize"])
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


def cut_high(
    counts: Sequence[npt.NDArray[np.uint32]], tensor: TensorPlan, experts: Experts
) -> list[Cut | None]:
    """Find the high bits of each expert's threshold; None for one that is not trimmed.

    Args:
        counts: per span of the tensor the result of `kernels.count_high`.
        tensor: the plan.
        experts: its view for the kernel.
    """
    total = _added(counts)
    return [
        Cut(*_bin_of(total[e], n_kept(tensor.output.n_elements, tensor.densities[e])))
        if experts.modes[e] == TRIM
        else None
        for e in range(len(total))
    ]


def cut_low(
    counts: Sequence[npt.NDArray[np.uint32]],
    cuts: Sequence[Cut | None],
    tensor: TensorPlan,
    experts: Experts,
) -> list[Experts]:
    """Find the exact thresholds, and where in the run of ties each span of the tensor begins.

    Args:
        counts: per span the result of `kernels.count_low`.
        cuts: the high bits.
        tensor: the plan.
        experts: its view for the kernel.

    Returns:
        The view of each span.
    """
    total = _added(counts)
    thresholds, ties = experts.thresholds.copy(), np.zeros((len(counts), *experts.ties.shape), int)
    for e, cut in enumerate(cuts):
        if cut is None:
            continue
        wanted = n_kept(tensor.output.n_elements, tensor.densities[e]) - cut.n_above
        low, n_above = _bin_of(total[e], wanted)
        bits = np.uint32((cut.high << int(kernels.LOW_BITS)) | low)
        thresholds[e] = bits.view(np.float32)
        wanted, n_tied, n_before = wanted - n_above, int(total[e, low]), 0
        for span, count in enumerate(counts):
            ties[span, e] = wanted, n_tied, n_before * wanted % n_tied
            n_before += int(count[e, low])
    return [experts._replace(thresholds=thresholds, ties=tied) for tied in ties]


def _mode(fused: Fused, density: float, n_elements: int) -> int:
    if fused.thins == TRIM:
        k = n_kept(n_elements, density)
        return KEEP_ALL if k == n_elements else TRIM if k else KEEP_NONE
    if fused.thins == DRAW:
        return KEEP_ALL if density >= 1 else DRAW
    return KEEP_ALL


def _in_order(weights: Sequence[float]) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total += np.float32(weight)
    return total


def _added(counts: Sequence[npt.NDArray[np.uint32]]) -> npt.NDArray[np.int64]:
    total = counts[0].astype(np.int64)
    for count in counts[1:]:
        total += count
    return total


def _bin_of(counts: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])
