import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lewis_hub.kernels.random_bits import halves
from lewis_hub.methods.dare import della, della_linear, drop_by_rank, probabilities

ONES = torch.ones(2)


def naive_drop_by_rank(rows, density, spread, stream, scale=None, dtype=np.float32):
    """From the description, entry by entry; rescaled."""
    scale = scale or [1.0] * len(rows[0])
    if density >= 1:
        return rows
    spread, n = min(spread, density, 1 - density), len(rows[0])
    drawn = halves(stream, n * len(rows)).tolist()
    found = []
    for i, row in enumerate(rows):
        counted = np.abs(np.array(row, dtype) * np.array(scale, dtype)).tolist()
        order = sorted(range(n), key=lambda j: (counted[j], j))
        kept = []
        for j, value in enumerate(row):
            share = order.index(j) / (n - 1) if n > 1 else 0.5
            p = min(max(density - spread + 2 * spread * share, 0.0), 1.0)
            is_kept = drawn[i * n + j] < round(p * 2**32)
            kept.append(value / p if is_kept else 0.0)
        found.append(kept)
    return found


VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0]) | st.floats(-9, 9, width=32)


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=5)
    ),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(0, 2**64 - 1),
    st.sampled_from([torch.float32, torch.float64]),
)
@example([[1.0, -1.0, 1.0]], 0.5, 0.5, 3, torch.float32)
@example([[2.0]], 0.5, 0.15, 3, torch.float32)
def test_entries_are_dropped_as_the_description_says(rows, density, spread, stream, dtype):
    vector = torch.tensor(rows, dtype=dtype)

    dropped = drop_by_rank(vector, density, spread, stream, rescale=True)

    expected = torch.tensor(naive_drop_by_rank(rows, density, spread, stream), dtype=dtype)
    torch.testing.assert_close(dropped, expected, rtol=1e-6, atol=0)


def test_probabilities_rise_with_the_rank_around_the_density():
    assert probabilities(4, 0.5, 0.15) == pytest.approx([0.35, 0.45, 0.55, 0.65])


def test_a_spread_that_does_not_fit_is_narrowed_and_the_mean_stays():
    assert probabilities(3, 0.95, 0.15) == pytest.approx([0.9, 0.95, 1.0])
    assert probabilities(3, 0.1, 0.15) == pytest.approx([0.0, 0.1, 0.2])
    assert probabilities(1, 0.3, 0.15).tolist() == [0.3]


@pytest.mark.parametrize("stream", range(20))
def test_of_equal_magnitudes_the_smaller_index_ranks_lower(stream):
    # probabilities 0, 1/2 and 1
    kept = drop_by_rank(torch.tensor([1.0, -1.0, 1.0]), 0.5, 0.5, stream, rescale=False)

    assert kept[0] == 0.0
    assert kept[2] == 1.0


def test_rows_are_ranked_by_themselves():
    # in each row the larger entry has probability 1, the smaller 0
    vector = torch.tensor([[1.0, 2.0], [-8.0, 7.0]])

    kept = drop_by_rank(vector, 0.5, 0.5, 3, rescale=False)

    assert kept.tolist() == [[0.0, 2.0], [-8.0, 0.0]]


def test_della_linear_divides_by_an_entrys_own_probability():
    vector = torch.tensor([[4.0, -1.0, 3.0, 2.0]])
    below = [0.65, 0.35, 0.55, 0.45]  # by rank 3, 0, 2, 1
    drawn = [half / 2**32 for half in halves(0, 4).tolist()]
    kept = [d < p for d, p in zip(drawn, below, strict=True)]

    merged = della_linear(
        torch.full((4,), 10.0),
        vector,
        weights=torch.tensor([2.0]),
        densities=[0.5],
        spreads=[0.15],
        streams=[0],
        lambda_=0.5,
    )

    expected = [
        10.0 + 0.5 * 2.0 * value / p if is_kept else 10.0
        for value, p, is_kept in zip(vector[0].tolist(), below, kept, strict=True)
    ]
    assert 0 < sum(kept) < 4
    assert merged.tolist() == pytest.approx(expected)


def test_della_elects_a_sign_and_averages_what_agrees():
    base = torch.full((3,), 10.0)
    vectors = torch.tensor([[3.0, -1.0, 1.0], [1.0, 4.0, -1.0]])

    merged = della(
        base, vectors, weights=ONES, densities=[1, 1], spreads=[0.15, 0.15], streams=[0, 1]
    )

    # both positive: mean of 3 and 1 | 4 outvotes -1 | a draw keeps the base
    assert merged.tolist() == [12.0, 14.0, 10.0]


@settings(deadline=None)  # the first example loads torch's kernels
@given(
    st.lists(st.floats(0, 9, width=32), min_size=4, max_size=4),
    st.integers(0, 2**64 - 1),
    st.sampled_from([(torch.float32, np.float32), (torch.float64, np.float64)]),
)
def test_entries_are_ranked_by_what_their_input_counts_for(scale, stream, dtypes):
    dtype, of_numpy = dtypes
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)

    dropped = drop_by_rank(rows, 0.5, 0.4, stream, torch.tensor(scale, dtype=dtype), rescale=True)

    expected = naive_drop_by_rank(rows.tolist(), 0.5, 0.4, stream, scale, of_numpy)
    torch.testing.assert_close(dropped, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("method", [della, della_linear])
def test_second_moments_decide_where_the_trim_is_by_activation(method):
    # the first is the smaller of the row, but driven a hundred times as hard (a norm of 10)
    vector, gram = torch.tensor([[[1.0, 2.0]]]), torch.diag(torch.tensor([100.0, 1.0]))[None]

    def merged(**asked):
        given = {"weights": ONES[:1], "densities": [0.5], "spreads": [0.5], "streams": [1]}
        return method(torch.zeros(1, 2), vector, **given, **asked).tolist()

    assert merged() == [[0.0, 2.0]]
    assert merged(grams=[gram]) == [[0.0, 2.0]]
    assert merged(grams=[gram], trim="activation") == [[1.0, 0.0]]
    assert merged(grams=[None], trim="activation") == [[0.0, 2.0]]
    assert merged(grams=[gram], trim="activation", trim_exponent=0.0) == [[0.0, 2.0]]


@pytest.mark.parametrize("density", [0.3, 0.5, 0.97])
def test_the_density_is_kept_on_average_and_rescaling_keeps_the_sum(density):
    n = 200_000
    vector = torch.linspace(1, 2, n)

    kept = drop_by_rank(vector, density, 0.15, 99, rescale=True)

    assert abs(int((kept != 0).sum()) - density * n) < 5 * math.sqrt(n * density * (1 - density))
    assert float(kept.double().sum() / vector.double().sum()) == pytest.approx(1.0, abs=0.02)


def test_the_first_rows_do_not_depend_on_how_many_there_are():
    vector = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))

    whole, half = (drop_by_rank(v, 0.5, 0.15, 7, rescale=True) for v in (vector, vector[:3]))

    assert torch.equal(whole[:3], half)
