"""DELLA's ranks are those of a stable sort, however close the magnitudes lie."""

import numpy as np
import pytest

from lewis_hub.kernels.calls import EXPERT, F32, N_BINS, RANK, Mix, Piece, Table, merge_task_vectors
from lewis_hub.kernels.random_bits import halves
from lewis_hub.kernels.vote import SHORT, sort

ROW = 300
LENGTHS = [1, 2, 3, 5, 17, SHORT - 1, SHORT, SHORT + 1, 2 * SHORT, ROW]


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


def kept_by_a_stable_sort(row, first, stream, below, factors):
    ranks = np.empty(row.size, np.int64)
    ranks[np.abs(row).argsort(kind="stable")] = np.arange(row.size)
    drawn = halves(stream, row.size, first) < below[ranks]
    return np.where(drawn, row * factors[ranks], np.float32(0))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("deltas", ROWS.values(), ids=ROWS)
def test_what_is_kept_is_what_a_stable_sort_says(deltas, length):
    deltas = deltas.ravel()[: deltas.size // length * length].reshape(-1, length)
    below = np.arange(1, length + 1, dtype=np.uint64) * np.uint64((1 << 32) // (length + 1))
    factors = 1 + np.arange(length, dtype=np.float32)
    one = np.float32(1)
    experts = np.zeros(1, EXPERT)
    experts["mode"], experts["weight"], experts["stream"] = RANK, 1, 11
    mix = Mix(elects=False, normalize=False, divisor=one, scale=one)
    raw = tuple(a.ravel().view(np.uint8) for a in (np.zeros_like(deltas), deltas))
    out = np.zeros(4 * deltas.size, np.uint8)
    piece = Piece(raw, np.full(2, F32), deltas.size, length, length, out, F32)

    assert merge_task_vectors(piece, experts, Table(below[None], factors[None]), mix) == -1

    expected = [
        kept_by_a_stable_sort(row, length * (1 + i), 11, below, factors)
        for i, row in enumerate(deltas)
    ]
    assert out.view(np.float32).tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_counters_are_not_cleared_for_a_short_row(length):
    values = ROWS["of few magnitudes"].ravel()[:length]
    keys, counters = np.empty((2, length), np.uint64), np.full(N_BINS, 7, np.uint32)

    places = keys[sort(values, keys, counters)] & np.uint64(0xFFFFFFFF)

    assert places.tolist() == np.abs(values).argsort(kind="stable").tolist()
    assert (counters == 7).all() == (length <= SHORT)
