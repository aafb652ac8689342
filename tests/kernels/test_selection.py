"""The threshold is exact whatever the sample said, and a sample usually says enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.kernels import calls
from lewis_hub.kernels.calls import (
    AT_LOW,
    BF16,
    BLOCK,
    F32,
    HIGH_BINS,
    INSIDE,
    LOW_BINS,
    LOW_BITS,
    LOW_MASK,
    RUN,
    Piece,
)
from lewis_hub.kernels.selection import Bracket, Tally, at_ranks, bracket, pick


def tally_of(values, found):
    """What `calls.sort_out` makes of one span."""
    inside = values[(values > found.low) & (values < found.high)]
    at_low = (values == found.low).sum() if found.low != found.high else 0
    counts = [(values > found.high).sum(), (values == found.high).sum(), at_low, len(inside)]
    return Tally(np.array(counts, np.int64), inside)


@st.composite
def selections(draw):
    top = draw(st.sampled_from([1, 3, 50, 2**31 - 1]))  # few magnitudes make many ties
    values = np.array(draw(st.lists(st.integers(0, top), min_size=1, max_size=60)), np.uint32)
    low, high = sorted(draw(st.tuples(st.integers(0, top), st.integers(0, top))))
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=3)))
    return values, Bracket(low, high, 1.0), draw(st.integers(1, len(values))), cuts


@settings(deadline=None)
@given(selections())
def test_the_threshold_is_the_kth_largest_or_the_bracket_is_known_to_have_missed_it(case):
    values, found, k, cuts = case
    spans = np.split(values, cuts)

    threshold = pick([tally_of(span, found) for span in spans], found, k)

    kth = np.sort(values)[::-1][k - 1]
    assert (threshold is not None) == (found.low <= kth <= found.high)
    if threshold:
        assert threshold.bits == kth
        assert threshold.wanted == k - (values > kth).sum()
        assert threshold.tied == tuple((span == kth).sum() for span in spans)


@settings(deadline=None)
@given(st.data())
def test_what_lies_at_a_rank_is_what_sorting_would_put_there(data):
    top = data.draw(st.sampled_from([0, 2, 4095, 4096, 10**6, 2**32 - 1]))
    step = data.draw(st.sampled_from([1, 997]))
    drawn = data.draw(st.lists(st.integers(0, top // step), min_size=1, max_size=80))
    values = np.array(drawn, np.uint32) * np.uint32(step)
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=4))

    assert at_ranks(values, ranks) == np.sort(values)[ranks].tolist()


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 3), (2, 5), (0, (1 << 31) - 1), (7, 8)])
def test_the_kernel_sorts_out_as_the_tally_says(low, high):
    n = 2 * BLOCK + 37
    values = np.random.default_rng(1).integers(0, 10, n).astype(np.uint32)
    raw = np.zeros((2, n * 4), np.uint8)
    raw[1] = values.view(np.float32).view(np.uint8)  # denormals whose bits are the values
    piece = Piece(tuple(raw), np.full(2, F32), n, 0, BLOCK, raw[0], BF16)
    counts, inside = np.zeros((1, 4), np.int64), np.empty((1, n), np.uint32)

    calls.sort_out(piece, np.array([0]), np.array([[low, high]]), counts, inside)

    expected = tally_of(values, Bracket(low, high, 1.0))
    if low == high:
        counts[0, AT_LOW] = 0  # counted twice, and never asked for
    assert counts[0].tolist() == expected.counts.tolist()
    assert inside[0, : counts[0, INSIDE]].tolist() == expected.inside.tolist()


def test_the_kernel_fills_no_more_than_the_space_it_is_given():
    n = 2 * BLOCK
    values = np.full(n, 5, np.uint32).view(np.float32)
    raw = tuple(a.view(np.uint8) for a in (np.zeros_like(values), values))
    piece = Piece(raw, np.full(2, F32), n, 0, BLOCK, raw[0], BF16)
    counts, inside = np.zeros((1, 4), np.int64), np.zeros((2, BLOCK + 3), np.uint32)

    calls.sort_out(piece, np.array([0]), np.array([[4, 6]]), counts, inside[:1])

    assert counts[0, INSIDE] == BLOCK + 3
    assert (inside[0] == 5).all()
    assert (inside[1] == 0).all()


def test_a_sample_is_what_stands_at_its_places():
    n = BLOCK + 37
    values = np.random.default_rng(1).normal(size=(3, n)).astype(np.float32)
    piece = Piece(tuple(values.view(np.uint8)), np.full(3, F32), n, 0, BLOCK, values, F32)
    places, found = np.array([0, 5, n - RUN]), np.zeros((2, 3, RUN), np.uint32)

    calls.sample(piece, places, found)

    expected = [[abs(one - values[0])[p : p + RUN] for p in places] for one in values[1:]]
    assert found.view(np.float32).tolist() == np.array(expected).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_the_bins_count_every_magnitude(dtype):
    n = 2 * BLOCK + 37
    values = np.random.default_rng(1).normal(size=(2, n)).astype(np.float32)
    if dtype == np.uint16:  # what bfloat16 keeps
        values = (values.view(np.uint32) >> 16 << 16).view(np.float32)
    stored = values if dtype == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)
    raw = tuple(np.ascontiguousarray(row).view(np.uint8) for row in stored)
    kind = F32 if dtype == np.float32 else BF16
    piece = Piece(raw, np.full(2, kind), n, 0, BLOCK, raw[0], BF16)
    sizes = np.abs(values[1] - values[0]).view(np.uint32)
    high, low = np.zeros((1, HIGH_BINS), np.uint32), np.zeros((1, LOW_BINS), np.uint32)

    calls.count_bits(piece, np.array([0]), np.array([-1]), high)
    most = int(high.argmax())
    calls.count_bits(piece, np.array([0]), np.array([most]), low)

    assert np.array_equal(high[0], np.bincount(sizes >> LOW_BITS, minlength=HIGH_BINS))
    chosen = sizes[sizes >> LOW_BITS == most] & LOW_MASK
    assert np.array_equal(low[0], np.bincount(chosen, minlength=LOW_BINS))


def test_what_found_no_room_is_not_trusted():
    found = Bracket(0, 10, 1.0)
    full = Tally(np.array([0, 0, 0, 3], np.int64), np.array([5, 6, 7], np.uint32), overflown=True)

    assert pick([full], found, 2) is None


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.8, 0.99])
def test_a_sample_of_alike_places_leaves_a_narrow_bracket_around_the_threshold(fraction):
    values = np.random.default_rng(0).integers(0, 2**31, (2048, 16), np.uint32)

    found = bracket(values, fraction)

    assert found
    assert found.share < 0.03
    share_above = [(values > end).mean() for end in (found.high, found.low)]
    assert share_above[0] < fraction < share_above[1]


def test_a_sample_of_places_that_differ_widely_is_too_vague():
    values = np.repeat(np.arange(1, 129, dtype=np.uint32)[:, None], 512, axis=1)

    assert bracket(values, 0.5) is None
