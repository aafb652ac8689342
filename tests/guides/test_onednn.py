from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from lewis_hub.guides import activations
from lewis_hub.guides.onednn import ByOneDNN
from lewis_hub.guides.threads import threads

from .conftest import ARCHITECTURES, LLAMA, tiny_model, tokens_of

sizes = st.integers(1, 70)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.booleans())
def test_products_are_those_of_the_definition_and_the_same_on_any_number_of_threads(
    n_tokens, n_in, n_out, has_bias
):
    x, weight = torch.randn(n_tokens, n_in), torch.randn(n_out, n_in)
    bias = torch.randn(n_out) if has_bias else None
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())

    found = []
    for n_threads in (1, 2, 3, 8):
        with threads(n_threads), ByOneDNN(), torch.no_grad():
            found.append(linear(x, weight, bias=bias))

    torch.testing.assert_close(found[0].double(), wide, rtol=0, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 4, 33)])
def test_inputs_may_have_any_shape(shape):
    x, weight = torch.randn(shape), torch.randn(7, 33)

    with ByOneDNN():
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_multiplied_as_ever(dtype):
    x, weight = torch.randn(3, 33, dtype=dtype), torch.randn(7, 33, dtype=dtype)

    with ByOneDNN():
        assert torch.equal(linear(x, weight), x @ weight.T)


WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("config", [("LlamaConfig", WIDE), ("MixtralConfig", WIDE | EXPERTS)])
def test_a_text_of_any_length_is_measured_alike_on_any_number_of_threads(
    monkeypatch, saved, config
):
    monkeypatch.setitem(ARCHITECTURES, "wide", config)
    folder = saved(tiny_model("wide"))
    for n_tokens in (1, 3, 7, 9, 33):
        sets = [tokens_of([list(range(3, 3 + n_tokens))])]
        found = []
        for n_threads in (1, 2):
            with threads(n_threads):
                found.append(activations.measure(folder, "tiny", sets, "cpu", lambda _: None))
        assert found[0] == found[1], n_tokens
