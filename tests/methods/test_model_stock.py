import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.averages import model_stock

BASE = torch.tensor([10.0, 20.0])
SIXTY = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]])  # degrees apart


def test_the_share_of_the_average_follows_from_the_angle():
    merged = model_stock(BASE, BASE + SIXTY)

    # cosine 1/2: 2 * 1/2 / (1 + 1/2) = 2/3 of the average (3/4, sqrt(3)/4)
    assert merged.tolist() == pytest.approx([10.5, 20 + math.sqrt(3) / 6])


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_the_share_does_not_depend_on_how_short_the_task_vectors_are(size):
    merged = model_stock(torch.zeros(2), size * SIXTY)

    assert (merged / size).tolist() == pytest.approx([0.5, math.sqrt(3) / 6])


def test_models_at_right_angles_keep_the_base_and_so_do_opposite_ones():
    across = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    assert torch.equal(model_stock(BASE, BASE + across), BASE)
    # 1 + (2 - 1) * -1 = 0 divides nothing
    assert torch.equal(model_stock(BASE, torch.stack([BASE + 1, BASE - 1])), BASE)


def test_rows_go_their_own_way():
    base = torch.zeros(2, 2)
    models = torch.stack([SIXTY.new_tensor([[1.0, 0.0], [1.0, 0.0]]), SIXTY.flip(0)])

    merged = model_stock(base, models, filter_wise=True)

    # 60 degrees in the first row; equal in the second
    assert merged.flatten().tolist() == pytest.approx([0.5, math.sqrt(3) / 6, 1.0, 0.0])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.booleans())
def test_equal_models_are_their_own_merge(seed, n, filter_wise):
    generator = torch.Generator().manual_seed(seed)
    base, model = torch.randn(2, 3, 5, generator=generator)

    merged = model_stock(base, model.expand(n, 3, 5), filter_wise=filter_wise)

    torch.testing.assert_close(merged, model)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_the_models_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    base, *models = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    models = torch.stack(models)

    torch.testing.assert_close(model_stock(base, models[[2, 0, 1]]), model_stock(base, models))
