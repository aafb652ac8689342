"""TSV-M, Iso-C, KnOTS and WUDI against their formulas in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.regmean import wudi
from lewis_hub.methods.spectral import iso_c, knots_ties, tsv_m
from lewis_hub.methods.ties import ties

SIZES = {
    "n": st.integers(1, 4),
    "rows": st.integers(1, 9),
    "columns": st.integers(1, 9),
    "seed": st.integers(0, 99),
}


def drawn(n, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    base, *vectors = torch.randn(n + 1, rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return base, torch.stack(vectors), weights


def polar(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vt[kept]


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_tsv_m_makes_the_largest_singular_vectors_of_all_experts_orthogonal(n, rows, columns, seed):
    base, vectors, weights = drawn(n, rows, columns, seed)

    found = tsv_m(base, vectors, weights=weights, lambda_=0.7)

    k = max(1, min(rows, columns) // n)
    parts = [np.linalg.svd(v.numpy(), full_matrices=False) for v in vectors]
    left = polar(np.concatenate([u[:, :k] for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([vt[:k].T for _, _, vt in parts], axis=1))
    values = [w * s[:k] for w, (_, s, _) in zip(weights.tolist(), parts, strict=True)]
    expected = left @ np.diag(np.concatenate(values)) @ right.T
    np.testing.assert_allclose(found, base.numpy() + 0.7 * expected, rtol=1e-7, atol=1e-8)


def test_tsv_m_adds_experts_that_share_no_direction():
    vectors = torch.zeros(2, 4, 4)
    vectors[0, 0, 1], vectors[0, 1, 0] = 3.0, 2.0
    vectors[1, 2, 2], vectors[1, 3, 3] = 5.0, 1.0

    merged = tsv_m(torch.zeros(4, 4), vectors, weights=torch.tensor([1.0, 0.5]))

    torch.testing.assert_close(merged, vectors[0] + 0.5 * vectors[1])


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_iso_c_gives_all_directions_the_mean_singular_value(n, rows, columns, seed):
    base, vectors, weights = drawn(n, rows, columns, seed)

    found = iso_c(base, vectors, weights=weights, lambda_=0.7)

    mixed = sum(w * v.numpy() for w, v in zip(weights.tolist(), vectors, strict=True))
    u, s, vt = np.linalg.svd(mixed, full_matrices=False)
    np.testing.assert_allclose(found, base.numpy() + 0.7 * s.mean() * u @ vt, rtol=1e-6, atol=1e-7)


def test_iso_c_leaves_directions_that_no_expert_has():
    vectors = torch.zeros(2, 3, 3)
    vectors[0, 0, 0], vectors[1, 1, 1] = 4.0, 2.0

    merged = iso_c(torch.zeros(3, 3), vectors, weights=torch.ones(2))

    torch.testing.assert_close(merged, torch.diag(torch.tensor([3.0, 3.0, 0.0])))


@settings(max_examples=40, deadline=None)
@given(density=st.sampled_from([0.3, 1.0]), normalize=st.booleans(), **SIZES)
def test_knots_merges_in_the_basis_that_the_experts_share(
    n, rows, columns, seed, density, normalize
):
    base, vectors, weights = drawn(n, rows, columns, seed)
    given = {"weights": weights, "densities": [density] * n, "normalize": normalize}

    found = knots_ties(base, vectors, lambda_=0.7, **given)

    u, _, _ = np.linalg.svd(np.concatenate(list(vectors.numpy()), axis=1), full_matrices=False)
    aligned = torch.stack([torch.from_numpy(u.T @ v.numpy()) for v in vectors])
    merged = ties(torch.zeros_like(aligned[0]), aligned, **given).numpy()
    np.testing.assert_allclose(found, base.numpy() + 0.7 * u @ merged, rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(ridge=st.sampled_from([0.01, 0.1, 2.0]), **SIZES)
def test_wudi_is_regmean_with_the_task_vectors_rows_as_inputs(n, rows, columns, seed, ridge):
    base, vectors, weights = drawn(n, rows, columns, seed)

    found = wudi(base, vectors, weights=weights, ridge=ridge, anchor_scale=0.6, lambda_=0.7)

    total, wanted = np.zeros((columns, columns)), np.zeros((rows, columns))
    for w, v in zip(weights.tolist(), vectors.numpy(), strict=True):
        gram = w * v.T @ v / np.sum(v * v)
        total += gram
        wanted += v @ gram
    pull = ridge * np.trace(total) / columns
    anchor = sum(w * v for w, v in zip(weights.tolist(), vectors.numpy(), strict=True))
    wanted += pull * 0.6 * anchor / weights.mean().item()
    expected = np.linalg.solve(total + pull * np.eye(columns), wanted.T).T
    np.testing.assert_allclose(found, base.numpy() + 0.7 * expected, rtol=1e-3, atol=1e-4)


def test_wudi_adds_task_vectors_of_disjoint_inputs():
    vectors = torch.zeros(2, 2, 4)
    vectors[0, :, 0], vectors[1, :, 3] = 2.0, 3.0

    merged = wudi(torch.zeros(2, 4), vectors, weights=torch.ones(2), ridge=1e-6)

    torch.testing.assert_close(merged, vectors.sum(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [tsv_m, iso_c])
def test_other_tensors_are_averaged(method):
    vectors = torch.tensor([[1.0, 2.0], [4.0, 8.0]])

    merged = method(torch.ones(2), vectors, weights=torch.tensor([2.0, 1.0]))

    assert merged.tolist() == [3.0, 5.0]


def test_knots_merges_other_tensors_by_ties():
    vectors = torch.tensor([[1.0, -2.0, 0.1], [4.0, 8.0, 0.3]])
    given = {"weights": torch.tensor([2.0, 1.0]), "densities": [0.7, 0.4], "lambda_": 0.5}

    assert torch.equal(
        knots_ties(torch.ones(3), vectors, **given), ties(torch.ones(3), vectors, **given)
    )
