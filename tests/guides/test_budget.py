from __future__ import annotations

from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.errors import GuideError
from lewis_hub.guides.schedule import shifted, weighted_mean

SIZES = {"a": 30, "b": 10}


def test_a_worked_example():
    # (30 · .2 + 10 · .8) / 40 = .35: all move up by .15
    assert shifted({"a": 0.2, "b": 0.8}, SIZES, 0.5) == {
        "a": pytest.approx(0.35),
        "b": pytest.approx(0.95),
    }


tensors = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.tuples(st.floats(0.01, 1), st.integers(1, 10**9)),
    min_size=1,
    max_size=20,
)


@given(tensors, st.floats(0.01, 1))
def test_the_mean_is_reached_and_distances_stay_or_it_is_refused(tensors, mean):
    densities = {name: density for name, (density, _) in tensors.items()}
    sizes = {name: size for name, (_, size) in tensors.items()}
    try:
        found = shifted(densities, sizes, mean)
    except GuideError:
        move = mean - weighted_mean(densities, sizes)
        assert min(densities.values()) + move <= 1e-12 or max(densities.values()) + move > 1 - 1e-12
        return

    total = fsum(sizes[name] * density for name, density in found.items()) / sum(sizes.values())
    assert total == pytest.approx(mean, abs=1e-12)
    assert all(0 < density <= 1 for density in found.values())
    low = min(densities, key=lambda name: densities[name])
    for name, density in found.items():
        assert density - found[low] == pytest.approx(densities[name] - densities[low], abs=1e-12)


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_equal_densities_become_the_mean_to_the_bit(density, mean):
    assert shifted({"a": density, "b": density}, SIZES, mean) == {"a": mean, "b": mean}


def test_a_mean_out_of_reach_says_which_range_would_fit():
    with pytest.raises(GuideError) as caught:
        shifted({"a": 0.3, "b": 0.8}, SIZES, 0.05)

    assert str(caught.value) == (
        "guide.mean_density: a mean density of 0.05 is out of reach: densities from 0.3 to 0.8, of "
        "mean 0.425, would lie from -0.075 to 0.425, and a density lies in (0, 1].\n"
        "Bring gamma and epsilon closer together: epsilon - gamma of less than 0.2 fits."
    )
    # a quarter of the range lies below the mean: .2 / 4 = .05 is just not enough
    assert min(shifted({"a": 0.3, "b": 0.499}, SIZES, 0.05).values()) > 0


def test_a_mean_of_one_fits_equal_densities_alone():
    with pytest.raises(GuideError) as caught:
        shifted({"a": 0.3, "b": 0.8}, SIZES, 1.0)

    assert str(caught.value).endswith("epsilon - gamma of 0 fits.")
    assert shifted({"a": 0.3, "b": 0.3}, SIZES, 1.0) == {"a": 1.0, "b": 1.0}


def test_nothing_scheduled_needs_no_budget():
    assert shifted({}, {}, 0.5) == {}
