import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.averages import nuslerp, slerp

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
ROWS = st.lists(
    st.tuples(*[st.floats(-4, 4, width=32)] * 2), min_size=1, max_size=6
)  # of two models


def both(rows):
    pair = torch.tensor(rows, dtype=torch.float32).T
    return pair[0], pair[1]


def test_a_third_of_a_right_angle_is_thirty_degrees():
    merged = slerp(X, Y[None], t=1 / 3)

    # sin(60) / sin(90) and sin(30) / sin(90)
    assert merged.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5])


def test_lengths_are_mixed_by_the_same_factors():
    merged = slerp(2 * X, 6 * Y[None], t=0.5)

    # sin(45) each
    assert merged.tolist() == pytest.approx([2 * math.sqrt(0.5), 6 * math.sqrt(0.5)])


def test_nearly_parallel_and_opposite_tensors_are_mixed_on_a_straight_line():
    assert slerp(X, 3 * X[None], t=0.25).tolist() == [1.5, 0.0]
    assert slerp(X, -3 * X[None], t=0.25).tolist() == [0.0, 0.0]


def test_a_tensor_of_zeros_counts_as_at_right_angles():
    merged = slerp(0 * X, 2 * Y[None], t=0.5)

    assert merged.tolist() == pytest.approx([0.0, 2 * math.sqrt(0.5)])


@settings(deadline=None)
@given(ROWS)
def test_the_ends_are_the_models(rows):
    base, other = both(rows)

    assert torch.equal(slerp(base, other[None], t=0.0), base)
    assert torch.equal(slerp(base, other[None], t=1.0), other)


@settings(deadline=None)
@given(ROWS, st.floats(0, 1))
def test_going_back_is_the_same_way(rows, t):
    base, other = both(rows)

    there, back = slerp(base, other[None], t=t), slerp(other, base[None], t=1 - t)

    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-5)


def test_nuslerp_goes_as_far_as_the_weights_say():
    # t = 1 / (2 + 1)
    merged = nuslerp(torch.zeros(2), torch.stack([X, Y]), weights=torch.tensor([2.0, 1.0]))

    assert merged.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5])


def test_nuslerp_turns_task_vectors_around_the_base():
    base = torch.tensor([10.0, 20.0])

    merged = nuslerp(base, torch.stack([base + X, base + Y]), weights=torch.ones(2))

    assert merged.tolist() == pytest.approx([10 + math.sqrt(0.5), 20 + math.sqrt(0.5)])


def test_weights_that_cancel_go_half_way():
    merged = nuslerp(torch.zeros(2), torch.stack([X, Y]), weights=torch.tensor([1.0, -1.0]))

    assert merged.tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_rows_are_turned_by_their_own_angles_and_so_are_columns():
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    given = {"weights": torch.ones(2), "nuslerp_flatten": False}
    half = math.sqrt(0.5)

    by_rows = nuslerp(torch.zeros(2, 2), torch.stack([first, second]), **given)
    by_columns = nuslerp(
        torch.zeros(2, 2), torch.stack([first.T, second.T]), **given, nuslerp_row_wise=True
    )

    # the first at right angles, the second parallel: the mean of 2 and 4
    assert by_rows.flatten().tolist() == pytest.approx([half, half, 3.0, 0.0])
    assert torch.equal(by_columns, by_rows.T)


def test_one_row_is_turned_like_the_flattened_tensor():
    models = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(3))
    base, weights = torch.zeros(1, 9), torch.tensor([0.2, 0.5])

    flat = nuslerp(base, models, weights=weights)
    by_rows = nuslerp(base, models, weights=weights, nuslerp_flatten=False)

    torch.testing.assert_close(flat, by_rows)
