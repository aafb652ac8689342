"""How large an expert's task vectors are, piece by piece from the files."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, Reader
from lewis_hub.kernels.operands import Floats
from lewis_hub.merge.quantised import read_floats
from lewis_hub.merge.runners import Runner
from lewis_hub.progress import Advance

PIECE = 1 << 18  # elements that are read together


def relative_changes(
    base: tuple[Checkpoint, Reader],
    expert: tuple[Checkpoint, Reader],
    tensors: Sequence[str],
    runner: Runner,
    advance: Advance,
) -> dict[str, float]:
    """Of each tensor ‖expert - base‖ / ‖base‖, by the Frobenius norm.

    Args:
        base: headers, and where the tensors are read.
        expert: likewise. A tensor that it lacks counts as the base's.
        tensors: names of floating-point tensors of the base; of one shape in both.
        runner: works on several tensors at a time; the result is the same whichever it is.
        advance: called with the number of elements done.

    Returns:
        In the order of `tensors`. Entries that are not finite count for nothing: the merge refuses
        or mends them. Where the base is zero and the expert is not: 1.
    """

    def change(name: str) -> tuple[float, int]:
        of_base, of_expert = base[0].tensors[name], expert[0].tensors.get(name)
        if of_expert is None or of_base.dtype not in MERGEABLE:
            return 0.0, of_base.n_elements
        return _change(base[1], of_base, expert[1], of_expert), of_base.n_elements

    found = {}
    for name, (value, n_elements) in zip(tensors, runner.map(change, tensors), strict=True):
        found[name] = value
        advance(n_elements)
    return found


def _change(base: Reader, of_base: TensorHeader, expert: Reader, of_expert: TensorHeader) -> float:
    difference = norm = 0.0
    for first in range(0, of_base.n_elements, PIECE):
        n = min(PIECE, of_base.n_elements - first)
        before, after = (
            read_floats(base, of_base, first, n),
            read_floats(expert, of_expert, first, n),
        )
        difference += _square_sum(after - before)
        norm += _square_sum(before)
    return sqrt(difference / norm) if norm else float(difference > 0)


def _square_sum(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.square(finite, dtype=np.float64).sum())
