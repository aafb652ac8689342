"""Of tied entries those are kept that the rule names, whatever the strips are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.merge.lanes import U32, U64
from lewis_hub.merge.native import address_of, compiled
from lewis_hub.merge.turns import Turns


def write(code):
    turns, at = Turns(code, code.arguments["ties"]), code.arguments
    with code.counting(code.number(0), at["n"]) as i:
        places = code.load(at["places"] + i * 4, U32)
        with code.when(places.differs(0)):
            code.store(turns.taken(places), at["kept"] + i * 4)
    code.give_back(code.load(at["ties"] + 16, U64))


take = compiled("take", ("n", "places", "kept", "ties"), write)


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
    places, kept = np.array(strips, np.uint32), np.zeros(len(strips), np.uint32)
    ties = np.array([wanted, tied, before * wanted % tied], np.uint64)

    remainder = take(len(strips), address_of(places), address_of(kept), address_of(ties))

    assert kept.tolist() == kept_of(strips, wanted, tied, before)
    n_seen = before + sum(strip.bit_count() for strip in strips)
    assert remainder == n_seen * wanted % tied
