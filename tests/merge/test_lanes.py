"""The little language computes what its operators say, in every lane."""

import numpy as np
import pytest

from lewis_hub.merge import native
from lewis_hub.merge.lanes import F32, U32, U64
from lewis_hub.merge.native import address_of, compiled
from lewis_hub.merge.operands import LANES

NUMBERS = np.array([0, 1, 2, 3, 7, 255, 2**31, 2**32 - 1] * 2, np.uint32)
FLOATS = np.array([0, -0.0, 1, -1, np.inf, np.nan, 1e-45, -3.5] * 2, np.float32)


def run(make, given, kind=U32):
    """What `make(code, lanes)` gives for 16 numbers."""
    found = np.zeros(LANES, np.uint32)

    def write(code):
        value = code.load(code.arguments["given"], kind, LANES)
        code.store(make(code, value), code.arguments["found"])
        code.give_back(code.number(0))

    function = compiled("tried", ("given", "found"), write)
    assert function(address_of(given), address_of(found)) == 0
    return found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda v: v + 1, NUMBERS + np.uint32(1)),
        (lambda v: v * 3, NUMBERS * np.uint32(3)),
        (lambda v: v % 7, NUMBERS % np.uint32(7)),
        (lambda v: v >> 3, NUMBERS >> np.uint32(3)),
        (lambda v: (v << 3) ^ 5, (NUMBERS << np.uint32(3)) ^ np.uint32(5)),
        (lambda v: v.where(v > 3), np.where(NUMBERS > 3, NUMBERS, 0)),
        (lambda v: v.smallest(v * 0 + 7), np.minimum(NUMBERS, 7)),
        (lambda v: v.largest(v * 0 + 7), np.maximum(NUMBERS, 7)),
        (lambda v: v.equals(7).packed.everywhere(), np.full(LANES, 0b0001000000010000)),
        (lambda v: (v > 254).packed.lowest_bit.everywhere(), np.full(LANES, 5)),
        (lambda v: v.where((v > 254).packed.unpacked), np.where(NUMBERS > 254, NUMBERS, 0)),
    ],
)
def test_integers_have_no_sign_and_wrap_around(make, expected):
    assert run(lambda _, value: make(value), NUMBERS).tolist() == expected.tolist()


@pytest.mark.parametrize("features", [native.FEATURES, frozenset()])
def test_chosen_lanes_are_stored_next_to_each_other(features, monkeypatch):
    monkeypatch.setattr(native, "FEATURES", features)

    def write(code):
        at = code.arguments
        value = code.load(at["given"], U32, LANES)
        code.store_chosen(value, at["chosen"].narrowed(U32).unpacked, at["found"])
        code.give_back(code.number(0))

    store = compiled("store_chosen", ("given", "chosen", "found"), write)
    given = np.arange(100, 100 + LANES, dtype=np.uint32)
    for chosen in range(1 << LANES):
        found = np.zeros(LANES, np.uint32)
        store(address_of(given), chosen, address_of(found))
        lanes = [lane for lane in range(LANES) if chosen >> lane & 1]
        assert found[: len(lanes)].tolist() == [100 + lane for lane in lanes]


@pytest.mark.parametrize("features", [native.FEATURES, frozenset()])
@pytest.mark.parametrize(
    ("low", "places", "expected"),
    [
        (0b101, 0b1101_0010, 0b0100_0010),
        (0b111_1111, 0b11, 0b11),
        (0b1, 0, 0),
        (2**16 - 1, 2**16 - 1, 2**16 - 1),
        (0b10, 2**31 + 1, 2**31),
    ],
)
def test_bits_are_deposited_in_order_whether_the_processor_can_or_not(
    features, low, places, expected, monkeypatch
):
    monkeypatch.setattr(native, "FEATURES", features)

    def write(code):
        asked = [code.arguments[name].narrowed(U32) for name in ("low", "places")]
        code.give_back(code.deposited(*asked).widened(U64))

    assert compiled("deposited", ("low", "places"), write)(low, places) == expected


def test_no_comparison_holds_for_nan():
    def make(_, value):
        return value.bits.where((value < 1) | (value >= 1) | value.differs(value * 2), 7)

    found = run(make, FLOATS, F32)

    assert found.tolist() == np.where(np.isnan(FLOATS), 7, FLOATS.view("u4")).tolist()


def test_products_and_sums_are_rounded_one_by_one():
    values = np.full(LANES, 1 + 2**-12, np.float32)

    found = run(lambda code, v: (v * v - code.many(1.0, F32)).bits, values, F32)

    # a fused operation would keep the last bit of the square: 2**-11 + 2**-24
    assert found.view(np.float32).tolist() == [2**-11] * LANES


def test_a_loop_counts_and_a_branch_is_taken_or_not():
    def write(code):
        total = code.variable(code.number(0))
        with (
            code.counting(code.number(0), code.arguments["n"], 3) as i,
            code.when((i % 2).equals(0)),
        ):
            total.set(total.value + i)
        code.give_back(total.value)

    assert compiled("counted", ("n",), write)(20) == sum(i for i in range(0, 20, 3) if i % 2 == 0)


def test_bytes_are_copied_and_words_regrouped():
    source, target = np.arange(4, dtype=np.uint64) << 33, np.zeros(8, np.uint32)

    def write(code):
        room = code.room(32)
        code.copy(code.arguments["source"], room, code.number(32))
        word = code.load(room, U64, 4)
        code.store(word.regrouped(U32, 8), code.arguments["target"])
        code.give_back(code.number(-1))

    function = compiled("copied", ("source", "target"), write)

    assert function(address_of(source), address_of(target)) == -1
    assert target.tolist() == [0, 0, 0, 2, 0, 4, 0, 6]
