from __future__ import annotations

import math
from itertools import product

import pytest

from lewis_hub.evaluate.paired import (
    compare_binary,
    compare_by_bootstrap,
    compare_items,
    holm,
    mcnemar,
    newcombe_interval,
    wilson_interval,
)


def mcnemar_by_enumeration(only_first: int, only_second: int) -> float:
    """Flip each discordant pair both ways: the share of outcomes at least as lopsided."""
    outcomes = list(product((-1, 1), repeat=only_first + only_second))
    lopsided = [abs(sum(o)) >= abs(only_first - only_second) for o in outcomes]
    return sum(lopsided) / len(outcomes)


def test_mcnemar_counts_the_outcomes_at_least_as_lopsided():
    tables = list(product(range(6), repeat=2))

    assert [mcnemar(*table) for table in tables] == [mcnemar_by_enumeration(*t) for t in tables]


def test_mcnemar_of_one_against_eight_is_twenty_in_512():
    assert mcnemar(1, 8) == 20 / 512


def test_mcnemar_stays_exact_where_binomials_overflow_a_float():
    assert mcnemar(0, 1_100) == 0.0  # 2**-1099 is below the smallest float
    assert mcnemar(0, 1_000) == 2.0**-999
    assert mcnemar(2_000, 2_000) == 1.0


def test_wilson_interval_of_81_in_263_is_the_published_one():
    low, high = wilson_interval(81 / 263, 263)

    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, p. 861


def test_newcombe_interval_is_that_of_the_textbook_example():
    low, high = newcombe_interval(both=14, only_first=5, only_second=0, neither=22)

    assert (round(low, 3), round(high, 3)) == (0.011, 0.226)  # Altman et al. 2000, table 6.2


def test_newcombe_interval_swaps_its_sign_with_the_two_models():
    low, high = newcombe_interval(40, 7, 3, 10)

    swapped = newcombe_interval(40, 3, 7, 10)

    assert swapped == pytest.approx((-high, -low), abs=1e-12)


def test_newcombe_interval_holds_the_difference_and_stays_between_minus_one_and_one():
    for table in product(range(4), repeat=4):
        if not sum(table):
            continue
        difference = (table[1] - table[2]) / sum(table)

        low, high = newcombe_interval(*table)

        assert -1 - 1e-12 <= low <= difference + 1e-12, table
        assert difference - 1e-12 <= high <= 1 + 1e-12, table
        assert low < high, table


def test_equal_answers_have_no_difference_but_an_interval():
    found = compare_binary([1.0] * 54, [1.0] * 54)

    assert (found.difference, found.p) == (0.0, 1.0)
    assert found.ci95 == pytest.approx((-0.0664, 0.0664), abs=5e-5)  # 1 - Wilson's lower limit


def test_bootstrap_agrees_with_all_possible_resamples():
    first, second = [0.9, 0.2, 0.7, 0.4], [0.5, 0.1, 0.9, 0.1]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    means = sorted(sum(sample) / 4 for sample in product(differences, repeat=4))
    observed = sum(differences) / 4
    extreme = sum(abs(m - observed) >= abs(observed) - 1e-12 for m in means) / len(means)

    found = compare_by_bootstrap(first, second, seed=1)

    assert found.difference == pytest.approx(observed)
    assert found.ci95[0] == pytest.approx(means[round(0.025 * 256)], abs=0.03)
    assert found.ci95[1] == pytest.approx(means[round(0.975 * 256) - 1], abs=0.03)
    assert found.p == pytest.approx(extreme, abs=0.02)


def test_bootstrap_repeats_itself_for_a_seed_and_moves_little_with_another():
    first = [math.sin(i) for i in range(50)]
    second = [math.sin(i + 0.3) for i in range(50)]

    one, again, other = (compare_by_bootstrap(first, second, seed) for seed in (7, 7, 8))

    assert one == again
    assert one != other
    assert one.ci95 == pytest.approx(other.ci95, abs=0.01)


def test_bootstrap_of_equal_numbers_finds_nothing():
    found = compare_by_bootstrap([0.3, 0.8, 0.5], [0.3, 0.8, 0.5], seed=1)

    assert (found.difference, found.ci95, found.p) == (0.0, (0.0, 0.0), 1.0)


def test_a_single_fraction_among_the_items_calls_for_the_bootstrap():
    binary = compare_items([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], seed=3)
    graded = compare_items([1.0, 0.0, 0.5], [0.0, 0.0, 1.0], seed=3)

    assert binary == compare_binary([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    assert graded == compare_by_bootstrap([1.0, 0.0, 0.5], [0.0, 0.0, 1.0], seed=3)


def test_holm_steps_down_and_never_lowers_a_later_value():
    # sorted: .005 x 4, .01 x 3, .03 x 2, then .04 x 1, lifted to the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


def test_holm_is_capped_at_one_and_takes_no_tests_at_all():
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()
