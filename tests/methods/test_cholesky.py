import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.numerics import cholesky, product, solve, torch_threads


def definite(n, seed, dtype=torch.float64, samples=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples or 2 * n, n, generator=generator, dtype=dtype)
    return x.T @ x / len(x)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 384), m=st.integers(0, 20), seed=st.integers(0, 99))
def test_what_is_solved_gives_the_right_side_again(n, m, seed):
    matrix = definite(n, seed)
    rows = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    found = solve(rows, cholesky(matrix))

    torch.testing.assert_close(found @ matrix, rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product(rows, matrix), rows @ matrix)


def test_a_matrix_that_is_not_definite_has_no_factor():
    assert cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None


def test_a_matrix_that_is_not_definite_in_float32_has_a_factor():
    matrix = definite(300, 1, torch.float32, samples=20) + 1e-6 * torch.eye(300)

    lower = cholesky(matrix)

    assert lower.dtype == torch.float64
    assert solve(matrix[:3], lower).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(1, 300), (2, 128), (64, 1000), (700, 577)])
def test_the_bytes_are_the_same_on_any_number_of_threads(m, n, dtype):
    matrix = definite(n, 1, dtype)
    rows = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for n_threads in (1, 2, 3):
        with torch_threads(n_threads):
            found.append(solve(product(rows, matrix), cholesky(matrix)))

    assert all(torch.equal(found[0], other) for other in found)
