import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lewis_hub.methods.ties import breadcrumbs, breadcrumbs_ties, keep_band
from lewis_hub.methods.votes import n_kept

VECTOR = torch.tensor([9.0, -8.0, 7.0, -6.0, 5.0, 4.0, 3.0, 2.0])


def test_the_largest_and_the_smallest_entries_are_dropped():
    # 8 entries: round(0.25 * 8) = 2 outliers, 4 kept
    kept = keep_band(VECTOR, 0.5, 0.25)

    assert kept.tolist() == [0.0, 0.0, 7.0, -6.0, 5.0, 4.0, 0.0, 0.0]


def test_what_is_kept_may_get_the_length_of_the_whole():
    # the whole has 44, what is kept 22
    kept = keep_band(VECTOR, 0.5, 0.25, rescale=True)

    assert kept.tolist() == [0.0, 0.0, 14.0, -12.0, 10.0, 8.0, 0.0, 0.0]
    assert keep_band(torch.zeros(4), 0.5, 0.0, rescale=True).tolist() == [0.0] * 4


def test_fewer_outliers_are_dropped_where_the_density_leaves_no_room():
    # 6 of 8 are kept, so 2 outliers go, not 4
    assert keep_band(VECTOR, 0.75, 0.5).tolist() == [0.0, 0.0, *VECTOR[2:].tolist()]
    assert torch.equal(keep_band(VECTOR, 1.0, 0.5), VECTOR)


def test_without_outliers_the_largest_are_kept_on_small_tensors_too():
    # round(0.01 * 8) = 0
    assert keep_band(VECTOR, 0.25, 0.01).tolist() == [9.0, -8.0, 0, 0, 0, 0, 0, 0]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.5, -0.5, 1.0, 2.0, -3.0]), max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
)
@example([1.0] * 10, 0.3, 0.2)
def test_exactly_the_number_that_is_said_is_kept(values, density, fraction):
    vector = torch.tensor(values)
    n = len(values)

    kept = keep_band(vector, density, fraction)

    k = n_kept(n, density)
    n_outliers = min(round(fraction * n), n - k)
    ordered = sorted((abs(value) for value in values), reverse=True)
    assert int((kept != 0).sum()) == k
    assert sorted(kept[kept != 0].abs().tolist(), reverse=True) == ordered[n_outliers:][:k]


def test_breadcrumbs_adds_the_weighted_rest_to_the_base():
    base, vectors = torch.full((8,), 10.0), torch.stack([VECTOR, torch.ones(8)])
    given = {"weights": torch.tensor([0.5, 2.0]), "densities": [0.25, 1.0], "outliers": [0.25, 0.1]}

    # of the first 7 and -6 stay: 10 + 0.5 * 7 + 2 and 10 - 0.5 * 6 + 2; elsewhere 10 + 2
    expected = [12.0, 12.0, 15.5, 9.0, 12.0, 12.0, 12.0, 12.0]
    assert breadcrumbs(base, vectors, **given).tolist() == expected
    # averaged: divided by 2.5
    averaged = breadcrumbs(base, vectors, **given, normalize=True)
    assert averaged.tolist() == pytest.approx([10.8, 10.8, 12.2, 9.6, 10.8, 10.8, 10.8, 10.8])


def test_breadcrumbs_ties_adds_only_what_agrees_with_the_elected_sign():
    base, vectors = torch.full((8,), 10.0), torch.stack([VECTOR, torch.ones(8)])
    given = {"weights": torch.tensor([0.5, 2.0]), "densities": [0.25, 1.0], "outliers": [0.25, 0.1]}

    merged = breadcrumbs_ties(base, vectors, **given, lambda_=2.0)

    # -3 outvotes 2 in the fourth
    assert merged.tolist() == [14.0, 14.0, 21.0, 4.0, 14.0, 14.0, 14.0, 14.0]
