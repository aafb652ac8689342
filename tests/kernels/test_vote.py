"""Of tied entries those are kept that the rule names, whatever the strips are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.kernels.vote import drop_ties


def kept_of(strips, wanted, tied, before):
    """By the rule: the j-th is kept when j * q / c passes a whole number."""
    found, j = [], before
    for places in strips:
        kept = 0
        for lane in (lane for lane in range(16) if places >> lane & 1):
            kept |= ((j + 1) * wanted // tied > j * wanted // tied) << lane
            j += 1
        found.append(kept)
    return found


@settings(deadline=None)
@given(st.data())
def test_evenly_spread_ones_are_kept(data):
    tied = data.draw(st.one_of(st.integers(1, 40), st.integers(2**31, 2**32 - 1)))
    wanted, before = (data.draw(st.integers(0, tied)) for _ in range(2))
    strips = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=6))
    remainder, kept = before * wanted % tied, []

    for places in strips:
        votes = np.ones(16, np.float32)
        lanes = np.array([lane for lane in range(16) if places >> lane & 1], np.uint16)
        remainder = drop_ties(votes, lanes, wanted, tied, remainder)
        assert votes.sum() == 16 - len(lanes) + votes[lanes].sum()  # no other is dropped
        kept.append(sum(1 << int(lane) for lane in lanes if votes[lane]))

    assert kept == kept_of(strips, wanted, tied, before)
    n_seen = before + sum(strip.bit_count() for strip in strips)
    assert remainder == n_seen * wanted % tied
