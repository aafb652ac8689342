import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.numerics import CHUNK, all_finite, cosine, dot, row_dots, total

NUMBERS = st.floats(-1000, 1000, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40))
def test_a_product_is_the_sum_of_products(pairs):
    first, second = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))

    expected = math.fsum(a * b for a, b in pairs)
    assert dot(first, second) == pytest.approx(expected, rel=1e-12, abs=1e-6)
    assert total(first) == pytest.approx(math.fsum(pair[0] for pair in pairs), abs=1e-9)


def test_long_tensors_are_added_up_in_chunks():
    values = torch.ones(2 * CHUNK + 3)

    assert dot(values, values) == 2 * CHUNK + 3
    assert row_dots(torch.ones(CHUNK + 1, 2), torch.ones(CHUNK + 1, 2)).unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("shape", "found"),
    [((), ()), ((0,), (1,)), ((3,), (1,)), ((2, 5), (2, 1)), ((2, 0), (2, 1)), ((0, 5), (0, 1))],
)
def test_rows_run_along_the_last_dimension(shape, found):
    values = torch.full(shape, 2.0)

    products = row_dots(values, values)

    assert products.shape == found
    assert products.dtype == torch.float64
    assert bool((products == 4.0 * (shape[-1] if shape else 1)).all())


def test_a_vector_of_zeros_is_at_right_angles_to_all():
    assert cosine(0.0, 0.0, 4.0) == 0.0
    assert cosine(3.0, 1.0, 4.0) == 1.0  # rounding never leaves [-1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_entry_that_is_not_finite_is_found(dtype):
    values = torch.full((7, 33), torch.finfo(dtype).max, dtype=dtype)

    assert all_finite(values)
    assert all_finite(values[:0])
    for number in (math.nan, math.inf, -math.inf):
        for place in (0, 100, 230):
            broken = values.clone()
            broken.view(-1)[place] = number
            assert not all_finite(broken)
