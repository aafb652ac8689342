from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lewis_hub.guides.onednn import is_there, multiply_by_onednn
from lewis_hub.guides.threads import threads

sizes = st.integers(1, 70)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.booleans())
def test_products_are_those_of_the_definition_and_the_same_on_any_number_of_threads(
    n_texts, n_in, n_out, bias
):
    linear = nn.Linear(n_in, n_out, bias=bias)
    x = torch.randn(n_texts, 5, n_in)
    wide = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)

    multiply_by_onednn(linear, "cpu")
    found = []
    for n_threads in (1, 2, 3, 8):
        with threads(n_threads), torch.no_grad():
            found.append(linear(x))

    torch.testing.assert_close(found[0].double(), wide, rtol=0, atol=2e-5)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 4, 33)])
def test_inputs_may_have_any_shape(shape):
    linear = nn.Linear(33, 7)
    x = torch.randn(shape)
    expected = linear(x)
    multiply_by_onednn(linear, "cpu")

    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)


class Router(nn.Linear):
    pass


def test_modules_of_another_kind_and_models_on_another_device_stay_as_they_are():
    model = nn.Sequential(nn.Linear(2, 2), Router(2, 2))

    multiply_by_onednn(model, "cuda")
    assert [type(module) for module in model] == [nn.Linear, Router]

    multiply_by_onednn(model, "cpu")
    assert [type(module) is nn.Linear for module in model] == [not is_there(), False]
    assert type(model[1]) is Router
