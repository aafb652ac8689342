import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.regmean import RIDGE, regmean, wudi
from lewis_hub.methods.ties import ties
from lewis_hub.methods.votes import trim


def moments(n_sources, width, seed, *, n_parts=1, samples=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_sources, n_parts, samples, width, generator=generator, dtype=torch.float64)
    return list(x.mT @ x / samples)


def naive(vectors, grams, weights, off_diagonal):
    """The normal equations row by row, as the paper has them, solved by numpy."""
    n_rows, width = vectors[0].shape
    total, shrunk = np.zeros((width, width)), []
    for w, gram in zip(weights, grams, strict=True):
        g = gram.numpy().copy()
        for i in range(width):
            for j in range(width):
                if i != j:
                    g[i, j] *= off_diagonal
        g += RIDGE * np.trace(g) / width * np.eye(width)
        shrunk.append(w * g)
        total += w * g
    found = np.zeros((n_rows, width))
    for i in range(n_rows):
        right = sum(g @ v[i].numpy() for g, v in zip(shrunk, vectors, strict=True))
        found[i] = np.linalg.solve(total, right)
    return torch.from_numpy(found)


def test_each_expert_decides_for_the_inputs_that_it_sees():
    base = torch.tensor([[10.0, 10.0]])
    vectors = torch.tensor([[[3.0, 5.0]], [[7.0, 1.0]]])
    grams = [torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])]

    merged = regmean(base, vectors, weights=torch.ones(2), densities=[1, 1], grams=grams)

    # (3 * 3 + 1 * 7) / 4 | (1 * 5 + 3 * 1) / 4
    torch.testing.assert_close(merged, torch.tensor([[14.0, 12.0]]), rtol=1e-5, atol=0)


def test_inputs_that_come_together_decide_together():
    vectors = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
    grams = [torch.tensor([[[1.0, 0.8], [0.8, 1.0]]]), torch.eye(2)[None]]
    given = {"weights": torch.ones(2), "densities": [1, 1], "grams": grams}

    merged = regmean(torch.zeros(1, 2), vectors, off_diagonal=0.5, **given)

    # x (2 0.4; 0.4 2) = (2 0.8): 0.4 of 0.8 lies off the diagonal
    expected = torch.tensor([[(2 * 2 - 0.4 * 0.8) / 3.84, (2 * 0.8 - 0.4 * 2) / 3.84]])
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_is_what_the_normal_equations_say(n, rows, width, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n, rows, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    grams = moments(n, width, seed)
    given = {"weights": weights, "densities": [1.0] * n, "off_diagonal": alpha, "lambda_": 0.7}

    found = regmean(base, vectors, grams=grams, **given)

    expected = naive(list(vectors), [g[0] for g in grams], weights.tolist(), alpha)
    torch.testing.assert_close(found, base + 0.7 * expected, rtol=1e-6, atol=1e-8)
    turned = regmean(base.T, vectors.mT, grams=grams, transposed=True, **given)
    assert torch.equal(turned, found.T)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_on_the_merges_inputs_it_gives_what_experts_give_on_theirs(n, rows, width, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n, rows, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(n, 1, 40, width, generator=generator, dtype=torch.float64)
    z = x + 0.3 * torch.randn(n, 1, 40, width, generator=generator, dtype=torch.float64)
    grams, crosses = list(x.mT @ x / 40), list(z.mT @ x / 40)
    given = {"weights": weights, "densities": [1.0] * n, "off_diagonal": alpha, "inputs": "merged"}

    found = regmean(base, vectors, grams=grams, cross_covariances=crosses, **given)

    # (the merged matrix) (sum of w G) = sum of w (an expert's matrix) C
    total, wanted = torch.zeros(width, width).double(), torch.zeros(rows, width).double()
    for w, vector, (gram,), (cross,) in zip(weights, vectors, grams, crosses, strict=True):
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(width)
        shrunk = [alpha * m + (1 - alpha) * m.diagonal().diag() + ridge for m in (gram, cross)]
        total += w * shrunk[0]
        wanted += w * (base + vector) @ shrunk[1]
    expected = torch.linalg.solve(total, wanted.T).T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    turned = regmean(
        base.T, vectors.mT, grams=grams, cross_covariances=crosses, transposed=True, **given
    )
    assert torch.equal(turned, found.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_the_block_lacks_is_mended_each_part_an_equal_share(transposed):
    generator = torch.Generator().manual_seed(5)
    base, *vectors = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    x, z = torch.randn(2, 2, 2, 40, 3, generator=generator, dtype=torch.float64)  # in two parts
    d = torch.randn(2, 1, 40, 4, generator=generator, dtype=torch.float64)
    grams, crosses, gaps = x.mT @ x / 40, z.mT @ x / 40, d.mT @ x / 40
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    given = {"weights": weights, "densities": [1, 1], "off_diagonal": 1.0, "inputs": "merged"}
    given |= {"grams": list(grams), "cross_covariances": list(crosses), "transposed": transposed}
    if transposed:
        base, vectors = base.T, [vector.T for vector in vectors]

    found = regmean(base, torch.stack(vectors), residual_covariances=list(gaps), **given)

    without = regmean(base, torch.stack(vectors), **given)
    mended = (found - without).T if transposed else found - without
    for part in range(2):
        total = (weights[:, None, None] * grams[:, part]).sum(0)
        wanted = (weights[:, None, None] * gaps[:, part]).sum(0) / 2
        expected = torch.linalg.solve(total, wanted.T).T
        columns = slice(3 * part, 3 * part + 3)
        torch.testing.assert_close(mended[:, columns], expected, rtol=1e-4, atol=1e-6)


def test_where_correlations_count_nothing_inputs_that_are_alike_mend_a_gap_once():
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(1)).double()
    alike, d = x.repeat(1, 4), 2 * x  # four inputs, and what is missing is twice each
    given = {"weights": torch.ones(1).double(), "densities": [1], "inputs": "merged"}
    given |= {
        "grams": [(alike.T @ alike / 40)[None]],
        "cross_covariances": [(alike.T @ alike / 40)[None]],
    }
    base, vectors = torch.zeros(1, 4).double(), torch.zeros(1, 1, 4).double()

    for alpha in (0.0, 0.5, 1.0):
        found = regmean(
            base,
            vectors,
            residual_covariances=[(d.T @ alike / 40)[None]],
            off_diagonal=alpha,
            **given,
        )

        torch.testing.assert_close(found, torch.full((1, 4), 0.5).double(), rtol=1e-4, atol=1e-6)


def test_the_merges_inputs_play_no_part_unless_they_are_asked_for():
    vectors = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
    grams, crosses = ([g.float() for g in moments(2, 10, seed)] for seed in (1, 2))
    given = {"weights": torch.ones(2), "densities": [1, 1], "grams": grams}

    own = regmean(torch.zeros(6, 10), vectors, cross_covariances=crosses, **given)

    assert torch.equal(own, regmean(torch.zeros(6, 10), vectors, **given))
    same = regmean(torch.zeros(6, 10), vectors, cross_covariances=grams, inputs="merged", **given)
    torch.testing.assert_close(same, own)


def test_float32_is_near_float64_though_few_tokens_were_seen():
    generator = torch.Generator().manual_seed(3)
    base, *vectors = torch.randn(3, 20, 200, generator=generator, dtype=torch.float64)
    grams = moments(2, 200, 3, samples=50)  # of rank 50
    grams[0] *= torch.logspace(-3, 3, 200, dtype=torch.float64).sqrt()
    grams[0] *= torch.logspace(-3, 3, 200, dtype=torch.float64).sqrt().unsqueeze(1)
    given = {"weights": torch.ones(2, dtype=torch.float64), "densities": [1, 1]}

    exact = regmean(base, torch.stack(vectors), grams=grams, **given)
    floats = [g.float() for g in grams]
    given["weights"] = torch.ones(2)
    found = regmean(base.float(), torch.stack(vectors).float(), grams=floats, **given)

    assert exact.dtype == torch.float64
    assert (found - exact).norm() / (exact - base).norm() < 1e-5


def test_one_expert_comes_back_whatever_it_saw():
    vectors = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(1))
    grams = [g.float() for g in moments(1, 10, 1)]

    merged = regmean(torch.zeros(6, 10), vectors, weights=torch.ones(1), densities=[1], grams=grams)

    torch.testing.assert_close(merged, vectors[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seen", ["the same", "nothing"])
def test_without_a_difference_in_what_they_see_it_is_the_weighted_average(seen):
    vectors = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
    gram = moments(1, 10, 1)[0].float()
    grams = [gram, gram] if seen == "the same" else [torch.zeros(1, 10, 10)] * 2
    weights = torch.tensor([3.0, 1.0])

    merged = regmean(torch.zeros(6, 10), vectors, weights=weights, densities=[1, 1], grams=grams)

    expected = (3 * vectors[0] + vectors[1]) / 4
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_second_moments_is_averaged():
    vectors = torch.tensor([[4.0, 8.0], [0.0, 4.0]])
    given = {"weights": torch.tensor([3.0, 1.0]), "densities": [1, 0.5]}

    for grams in ([None, None], [None, torch.eye(2)[None]]):
        merged = regmean(torch.ones(2), vectors, grams=grams, lambda_=0.5, **given)

        assert merged.tolist() == [1 + 0.5 * 3, 1 + 0.5 * 7]


def test_an_input_that_no_token_drove_is_averaged():
    vectors = torch.tensor([[[4.0, 4.0]], [[0.0, 0.0]]])
    grams = [torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])] * 2

    merged = regmean(
        torch.zeros(1, 2), vectors, weights=torch.ones(2), densities=[1, 1], grams=grams
    )

    torch.testing.assert_close(merged, torch.tensor([[2.0, 2.0]]))


def test_task_vectors_are_trimmed_as_by_ties_before():
    vectors = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    kept = torch.stack([trim(v, d) for v, d in zip(vectors, (0.3, 0.8), strict=True)])
    given = {"weights": torch.ones(2), "grams": [g.float() for g in moments(2, 6, 1)]}

    found = regmean(torch.zeros(5, 6), vectors, densities=[0.3, 0.8], **given)

    assert torch.equal(found, regmean(torch.zeros(5, 6), kept, densities=[1, 1], **given))


def test_long_inputs_go_part_by_part():
    vectors = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    grams = [g.float() for g in moments(2, 4, 1, n_parts=3)]
    given = {"weights": torch.ones(2), "densities": [1, 1]}

    found = regmean(torch.zeros(5, 12), vectors, grams=grams, **given)

    for number, part in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
        own = [gram[number : number + 1] for gram in grams]
        alone = regmean(torch.zeros(5, 4), vectors[:, :, part], grams=own, **given)
        assert torch.equal(found[:, part], alone)


@pytest.mark.parametrize("method", [ties, regmean])
def test_trimming_by_activation_ranks_by_magnitude_times_norm(method):
    vector = torch.tensor([[1.0, 3.0], [-2.5, 2.0]])
    grams = [torch.diag(torch.tensor([25.0, 1.0]))[None]]
    given = {"weights": torch.ones(1), "densities": [0.5], "trim": "activation"}

    found = method(torch.zeros(2, 2), vector[None], grams=grams, **given)
    turned = method(torch.zeros(2, 2), vector.T[None], grams=grams, transposed=True, **given)
    plain = method(torch.zeros(2, 2), vector[None], grams=grams, trim_exponent=0.0, **given)

    # 1 * 5, 3 * 1 | 2.5 * 5, 2 * 1
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [-2.5, 0.0]]))
    assert torch.equal(turned, found.T)
    torch.testing.assert_close(plain, torch.tensor([[0.0, 3.0], [-2.5, 0.0]]))


NORM_OF = {
    "none": lambda _: 1.0,
    "mean_diagonal": lambda gram: np.trace(gram) / len(gram),
    "frobenius": np.linalg.norm,
}


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    norm=st.sampled_from(sorted(NORM_OF)),
    ridge=st.sampled_from([0.01, 0.3, 5.0]),
    interpolation=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_ridge_pulls_towards_task_arithmetic(n, rows, width, norm, ridge, interpolation, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n, rows, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(n, 1, 40, width, generator=generator, dtype=torch.float64)
    z = x + 0.3 * torch.randn(n, 1, 40, width, generator=generator, dtype=torch.float64)
    rest = torch.randn(n, 1, 40, rows, generator=generator, dtype=torch.float64)
    given = {"off_diagonal": 1.0, "inputs": "merged", "compensate": False}

    found = regmean(
        base,
        vectors,
        weights=weights,
        densities=[1.0] * n,
        grams=list(x.mT @ x / 40),
        cross_covariances=list(z.mT @ x / 40),
        residual_covariances=list(rest.mT @ x / 40),
        normalize_grams=norm,
        ridge=ridge,
        anchor_scale=0.6,
        interpolation=interpolation,
        **given,
    )

    # over tokens: |W x - W_e (a z + (1 - a) x)|^2 w / (40 norm), plus ridge |W - anchor|^2
    total, wanted = np.zeros((width, width)), np.zeros((rows, width))
    for w, v, (own,), (expert,) in zip(
        weights.tolist(), vectors, x.numpy(), z.numpy(), strict=True
    ):
        share = w / NORM_OF[norm](own.T @ own / 40) / 40
        mixed = interpolation * expert + (1 - interpolation) * own
        total += share * own.T @ own
        wanted += share * (base + v).numpy() @ mixed.T @ own
    pull = ridge * (np.trace(total) / width if norm == "none" else 1.0)
    arithmetic = sum(w * v for w, v in zip(weights, vectors, strict=True)) / weights.mean()
    wanted += pull * (base + 0.6 * arithmetic).numpy()
    expected = np.linalg.solve(total + pull * np.eye(width), wanted.T).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_endless_ridge_is_task_arithmetic_with_and_without_statistics():
    generator = torch.Generator().manual_seed(3)
    base, *vectors = torch.randn(4, 5, 6, generator=generator)
    weights = torch.tensor([1.0, 2.0, 3.0])
    given = {"weights": weights, "densities": [1.0] * 3, "ridge": 1e9, "anchor_scale": 0.4}

    found = regmean(base, torch.stack(vectors), grams=moments_of(3, 6), **given)
    without = regmean(base, torch.stack(vectors), grams=[None] * 3, **given)

    a, b, c = vectors
    arithmetic = base + 0.4 * (0.5 * a + b + 1.5 * c)
    torch.testing.assert_close(found, arithmetic, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without, arithmetic, rtol=1e-5, atol=1e-6)


def test_a_direction_that_no_text_excites_stays_as_the_anchor_has_it():
    gram = torch.zeros(1, 3, 3)
    gram[0, 0, 0] = 4.0
    vectors = torch.tensor([[[1.0, 2.0, 3.0]], [[5.0, 6.0, 7.0]]])

    found = regmean(
        torch.zeros(1, 3),
        vectors,
        weights=torch.ones(2),
        densities=[1.0, 1.0],
        grams=[gram, gram],
        ridge=0.01,
        anchor_scale=0.5,
    )

    torch.testing.assert_close(found[0, 1:], torch.tensor([4.0, 5.0]), rtol=1e-3, atol=0)
    assert found[0, 0] == pytest.approx(3.0, rel=1e-2)  # the mean of what both experts give


def moments_of(n, width):
    return [gram.float() for gram in moments(n, width, 7)]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_endless_ridge_is_its_anchor_with_and_without_statistics(transposed):
    generator = torch.Generator().manual_seed(5)
    base, *vectors = torch.randn(4, 5, 6, generator=generator)
    weights = torch.tensor([1.0, 2.0, 3.0])
    given = {"weights": weights, "densities": [1.0] * 3, "ridge": 1e9, "transposed": transposed}
    by = {"anchor": "ties", "anchor_scale": 0.8, "anchor_density": 0.4}
    grams = moments_of(3, 5 if transposed else 6)

    found = regmean(base, torch.stack(vectors), grams=grams, **given, **by)
    without = regmean(base, torch.stack(vectors), grams=[None] * 3, **given, **by)
    at_base = regmean(base, torch.stack(vectors), grams=grams, anchor="base", **given)

    densities = [0.4] * 3
    expected = ties(base, torch.stack(vectors), weights=weights, densities=densities, lambda_=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at_base, base, rtol=1e-5, atol=1e-5)


def test_a_ridge_of_the_size_of_the_moments_meets_its_anchor_halfway():
    gram = 4.0 * torch.eye(2)[None]
    vectors = torch.tensor([[[6.0, 1.0]], [[4.0, -3.0]]])
    given = {"weights": torch.ones(2), "densities": [1.0, 1.0], "grams": [gram, gram], "ridge": 1.0}

    found = {
        anchor: regmean(torch.zeros(1, 2), vectors, anchor=anchor, **given).tolist()[0]
        for anchor in ("task_arithmetic", "ties", "base")
    }

    # without an anchor (5, -1); the sum is (10, -2), half of each by TIES (6, 0) and (4, 0): (5, 0)
    expected = {"task_arithmetic": [7.5, -1.5], "ties": [5.0, -0.5], "base": [2.5, -0.5]}
    for anchor, values in expected.items():
        assert found[anchor] == pytest.approx(values, rel=1e-5), anchor


@pytest.mark.parametrize("transposed", [False, True])
def test_a_prior_counts_rows_of_the_task_vector_as_further_inputs(transposed):
    generator = torch.Generator().manual_seed(11)
    base = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    vectors = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
    z = x + 0.3 * torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    found = regmean(
        base.T if transposed else base,
        vectors.mT if transposed else vectors,
        weights=weights,
        densities=[1.0, 1.0],
        grams=list((x.mT @ x / 30)[:, None]),
        cross_covariances=list((z.mT @ x / 30)[:, None]),
        transposed=transposed,
        inputs="merged",
        off_diagonal=1.0,
        prior=0.3,
    )

    # over tokens and rows: |W x - W_e z|^2 .7 w / 30, |W v - W_e v|^2 .3 w trace / |v|^2
    total, wanted = np.zeros((5, 5)), np.zeros((4, 5))
    for w, v, own, expert in zip(weights.tolist(), vectors.numpy(), x, z, strict=True):
        share = 0.3 * w * float((own**2).sum()) / 30 / (v**2).sum()
        of_tokens, of_rows = 0.7 * w / 30 * (own.T @ own).numpy(), share * v.T @ v
        total += of_tokens + of_rows
        wanted += (base.numpy() + v) @ (0.7 * w / 30 * (expert.T @ own).numpy() + of_rows)
    expected = np.linalg.solve(total, wanted.T).T
    np.testing.assert_allclose((found.T if transposed else found).numpy(), expected, rtol=1e-4)


def test_a_prior_alone_is_wudi_up_to_the_size_of_the_moments():
    generator = torch.Generator().manual_seed(12)
    base, first, second = torch.randn(3, 6, 4, generator=generator)
    vectors = torch.stack([first, second])
    grams = [torch.eye(4)[None]] * 2  # of equal trace

    found = regmean(
        base,
        vectors,
        weights=torch.ones(2),
        densities=[1.0, 1.0],
        grams=grams,
        off_diagonal=1.0,
        prior=1.0,
        ridge=0.1,
    )

    expected = wudi(base, vectors, weights=torch.ones(2), ridge=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_row_of_an_embedding_is_the_mean_of_the_experts_by_how_often_each_text_has_the_token():
    base = torch.full((4, 2), 10.0)
    vectors = torch.tensor(
        [
            [[4.0, 0.0], [1.0, 2.0], [3.0, 3.0], [1.0, 1.0]],
            [[0.0, 8.0], [5.0, 6.0], [9.0, 9.0], [3.0, 5.0]],
        ]
    )
    shares = [torch.tensor([0.75, 0.25, 0.0, 0.0]), torch.tensor([0.25, 0.0, 0.75, 0.0])]

    merged = regmean(
        base,
        vectors,
        weights=torch.tensor([1.0, 1.0]),
        densities=[1, 1],
        grams=[share.view(4, 1, 1) for share in shares],
        transposed=True,
        embeddings=True,
    )

    # 3 to 1 | the first alone | the second alone | no text has it: the average
    expected = torch.tensor([[13.0, 12.0], [11.0, 12.0], [19.0, 19.0], [12.0, 13.0]])
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "prior"),
    [("none", 0.0), ("mean_diagonal", 0.0), ("frobenius", 0.0), ("none", 0.4)],
)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_an_embedding_is_fitted_as_the_matrix_that_multiplies_one_hot_inputs(norm, prior, ridge):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    vectors = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    shares = torch.tensor([[0.5, 0.2, 0.3, 0, 0, 0], [0.1, 0, 0.2, 0.7, 0, 0]], dtype=torch.float64)
    told = {"weights": torch.tensor([1.0, 2.0], dtype=torch.float64), "densities": [1, 1]}
    told |= {"normalize_grams": norm, "prior": prior, "ridge": ridge, "anchor_scale": 0.7}

    merged = regmean(
        base,
        vectors,
        grams=[share.view(6, 1, 1) for share in shares],
        transposed=True,
        embeddings=True,
        **told,
    )

    dense = [share.diag()[None] for share in shares]
    # correlations that the prior gives between rows are left out
    expected = regmean(base, vectors, grams=dense, transposed=True, off_diagonal=0.0, **told)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_is_trimmed_by_magnitude_as_most_tokens_are_in_no_text():
    vectors = torch.tensor([[[4.0, 1.0], [2.0, 3.0]], [[1.0, 6.0], [8.0, 7.0]]])

    merged = regmean(
        torch.zeros(2, 2),
        vectors,
        weights=torch.tensor([1.0, 1.0]),
        densities=[0.5, 0.5],
        grams=[torch.tensor([1.0, 0.0]).view(2, 1, 1)] * 2,
        transposed=True,
        embeddings=True,
        trim="activation",
    )

    # kept: 4 and 3 of the first, 8 and 7 of the second; no text has the second token
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0], [4.0, 5.0]]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_each_matrix_of_a_stack_is_fitted_by_its_own_moments(transposed, ridge):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(3, 4, 6, generator=generator)
    vectors = torch.randn(2, 3, 4, 6, generator=generator)
    x = torch.randn(2, 3, 20, 2, 3, generator=generator)  # two parts of three inputs
    grams = torch.einsum("seniw,senij->seiwj", x, x)
    grams[1, 2] = 0.0  # no token of the second expert reached the last matrix
    told = {"weights": torch.tensor([1.0, 2.0]), "densities": [1, 1], "ridge": ridge}

    merged = regmean(
        base.mT if transposed else base,
        vectors.mT if transposed else vectors,
        grams=list(grams),
        transposed=transposed,
        **told,
    )

    for number in range(3):
        own = [None if number == 2 and e else grams[e, number] for e in range(2)]
        expected = regmean(base[number], vectors[:, number], grams=own, **told)
        found = merged[number].mT if transposed else merged[number]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_trimmed_by_the_activations_of_each_matrix(transposed):
    vectors = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 1.0]]]])
    squares = torch.tensor([[100.0, 1.0], [1.0, 4.0], [0.0, 0.0]])  # none reached the last one

    found = ties(
        torch.zeros(3, 2, 1) if transposed else torch.zeros(3, 1, 2),
        vectors.mT if transposed else vectors,
        weights=torch.ones(1),
        densities=[0.5],
        grams=[squares.view(3, 2, 1, 1)],
        transposed=transposed,
        trim="activation",
    )

    # times norms: 10 2 | 3 8 | 5 and 1 times 3.5, the mean norm
    assert found.flatten().tolist() == [1.0, 0.0, 0.0, 4.0, 5.0, 0.0]
