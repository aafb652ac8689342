import pytest
import torch

from lewis_hub.methods.numerics import within_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_within_the_tolerance_and_another_merge_is_not(dtype):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, 300, generator=generator)
    noise = torch.randn(200, 300, generator=generator)
    stored = exact.to(dtype)

    assert within_tolerance((exact + 2e-5 * noise).to(dtype), stored)
    assert not within_tolerance((exact + 0.03 * noise).to(dtype), stored)


def test_zeros_are_within_the_tolerance_of_zeros_alone():
    zeros = torch.zeros(3)

    assert within_tolerance(zeros, zeros)
    assert not within_tolerance(torch.full((3,), 1e-9), zeros)


def test_another_shape_or_dtype_and_nan_are_never_within_the_tolerance():
    ones = torch.ones(2, 3)

    assert not within_tolerance(ones.flatten(), ones)
    assert not within_tolerance(ones.bfloat16(), ones)
    assert not within_tolerance(ones / 0 * 0, ones)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_entry_allows_no_other_difference(dtype):
    stored = torch.tensor([1.0, 2.0, torch.inf], dtype=dtype)

    assert within_tolerance(stored.clone(), stored)
    assert not within_tolerance(torch.tensor([1.0, 2.0, 3.0], dtype=dtype), stored)
    assert not within_tolerance(torch.tensor([9.0, 2.0, torch.inf], dtype=dtype), stored)
