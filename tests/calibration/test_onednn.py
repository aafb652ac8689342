from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from lewis_hub.calibration.determinism import ByOneDNN, by_rows
from lewis_hub.methods.numerics import torch_threads

sizes = st.integers(1, 70)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.booleans())
def test_products_are_those_of_the_definition_and_the_same_on_any_number_of_threads(
    n_rows, n_in, n_out, has_bias
):
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    bias = torch.randn(n_out) if has_bias else None
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())

    found = []
    for n_threads in (1, 2, 3, 8):
        with torch_threads(n_threads):
            found.append(by_rows(x, weight, bias))

    torch.testing.assert_close(found[0].double(), wide, rtol=0, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 4, 33)])
def test_rows_may_have_any_shape(shape):
    x, weight = torch.randn(shape), torch.randn(7, 33)

    torch.testing.assert_close(by_rows(x, weight), x @ weight.T)


def test_matrices_may_be_parts_of_others_in_any_layout():
    whole = torch.randn(40, 50)
    parts = [whole[3:9, 4:20], whole[4:20, 3:9].T, whole[:, :16], whole[0, :16].expand(5, 16)]

    for weight in parts:
        for x in (whole[1:8, 30:46], whole[1:17, 30:41].T, whole[::3, 2:34:2]):
            torch.testing.assert_close(by_rows(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_multiplied_as_ever(dtype):
    x, weight = torch.randn(3, 33, dtype=dtype), torch.randn(7, 33, dtype=dtype)

    assert torch.equal(by_rows(x, weight), x @ weight.T)


def test_a_linear_inside_the_context_multiplies_so_with_its_bias_and_none_outside():
    module = torch.nn.Linear(33, 5)
    x = torch.randn(7, 33)

    with torch.no_grad(), ByOneDNN():
        inside = module(x), linear(input=x, weight=module.weight, bias=None)
    outside = module(x)

    assert torch.equal(inside[0], by_rows(x, module.weight, module.bias))
    assert torch.equal(inside[1], by_rows(x, module.weight))
    assert outside.requires_grad


def test_a_weight_without_values_is_an_error_though_torch_would_return_nonsense():
    with pytest.raises(RuntimeError, match="a weight that is on meta has no values"):
        by_rows(torch.randn(2, 3), torch.empty(4, 3, device="meta"))


def test_rows_of_another_width_are_refused_in_torchs_words():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(2x33 and 32x7\)"):
        by_rows(torch.ones(2, 33), torch.ones(7, 32))
