"""DELLA's ranks are those of a stable sort, however close the magnitudes lie."""

import numpy as np
import pytest

from lewis_hub.merge import kernels, plain
from lewis_hub.merge.operands import F32, LANES, RANK, Experts, Mix, Piece, Table

ROW = 300


def rows(values):
    return np.asarray(values, np.float32).reshape(-1, ROW)


NEAR = np.random.default_rng(3).integers(0, 1 << 9, 2 * ROW).astype(np.uint32)
ROWS = {
    "spread out": rows(np.random.default_rng(1).normal(size=2 * ROW)),
    "of few magnitudes": rows(np.random.default_rng(2).integers(-3, 4, 2 * ROW)),
    "alike but for the lowest bits": rows((0x3F800000 + NEAR).view(np.float32)),
    "falling by the lowest bits": rows(2 - np.arange(2 * ROW, dtype=np.float32) * 2.0**-22),
    "all zero": rows(np.zeros(2 * ROW)),
}


@pytest.mark.parametrize("deltas", ROWS.values(), ids=ROWS)
def test_what_is_kept_is_what_a_stable_sort_says(deltas):
    below = np.arange(ROW, dtype=np.uint64) * np.uint64((1 << 32) // ROW)
    factors = 1 + np.arange(ROW, dtype=np.float32)
    one = np.ones(1, np.float32)
    experts = Experts(
        modes=np.array([RANK]),
        weights=one,
        thresholds=one,
        ties=np.zeros((1, 3), np.int64),
        streams=np.array([11], np.uint64),
        below=np.zeros(1, np.uint64),
        factors=one,
        table=Table(below[None], factors[None]),
    )
    mix = Mix(elects=False, normalize=False, divisor=one[0], scale=one[0])
    raw = tuple(a.ravel().view(np.uint8) for a in (np.zeros_like(deltas), deltas))

    def merged(room):
        out = np.zeros(4 * (deltas.size + LANES), np.uint8)
        piece = Piece(raw, np.full(2, F32), deltas.size, ROW, ROW, out, F32)
        assert room.merge_task_vectors(piece, experts, mix) == -1
        return out[: 4 * deltas.size].view(np.float32).tolist()

    assert merged(kernels) == merged(plain)
