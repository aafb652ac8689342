"""Blocks of models of different depth are matched by CKA and dynamic programming (SMA)."""

import time
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.depth import require_same_blocks
from lewis_hub.merge.segments import align_segments, linear_cka, match_blocks, weight_cosines


def cka_by_definition(ours, theirs):
    """Kornblith et al.: HSIC of linear kernels, centred by H = I - 1/n, normalised."""
    n = len(ours)
    centring = np.eye(n) - 1 / n
    kernels = [centring @ one @ one.T @ centring for one in (ours, theirs)]
    hsic = [[np.trace(a @ b) for b in kernels] for a in kernels]
    return hsic[0][1] / np.sqrt(hsic[0][0] * hsic[1][1])


def test_cka_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    ours = [generator.normal(size=(20, 5)) + 3, generator.normal(size=(20, 5))]
    theirs = [generator.normal(size=(20, 8)), ours[1] * 2 - 1, np.ones((20, 4))]

    found = linear_cka(*([torch.from_numpy(one) for one in side] for side in (ours, theirs)))

    assert found.shape == (2, 3)
    for k, own in enumerate(ours):
        for number, other in enumerate(theirs[:2]):
            assert found[k, number] == pytest.approx(cka_by_definition(own, other), abs=1e-6)
    assert found[1, 1] == pytest.approx(1, abs=1e-6)  # neither scale nor offset matters
    assert found[:, 2].tolist() == [0, 0]  # a constant resembles nothing


def test_cka_ignores_the_order_of_units():
    seen = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))

    found = linear_cka([seen], [seen[:, [3, 1, 5, 0, 2, 4]]])

    assert found[0, 0] == pytest.approx(1, abs=1e-6)


def test_cka_of_huge_outputs_is_that_of_small_ones():
    """Products of two such numbers are infinite in float32."""
    seen, other = (torch.randn(9, 6, generator=torch.manual_seed(n)) for n in (0, 1))
    found = linear_cka([seen * 2.0**100], [other * 2.0**100, other])

    assert np.array_equal(found, linear_cka([seen], [other, other]))


def test_blocks_are_compared_one_after_the_other():
    """Names of the first block times numbers of blocks are 4 million here."""
    part = "input_layernorm.weight"
    stored = [f"p{n}.layers.0.{part}" for n in range(2_000)]
    stored += [f"p0.layers.{n}.{part}" for n in range(1, 2_000)]
    tensors = {name: TensorHeader(name, "F32", (1,), "file", 0, 4) for name in stored}
    model = Checkpoint("org/model", tensors, None)

    began = time.process_time()
    with pytest.raises(AlignmentError, match="it lacks p1.layers.1.input_layernorm.weight of its"):
        require_same_blocks(model, model)
    assert time.process_time() - began < 2


def test_the_similarity_of_weights_is_the_mean_cosine_of_the_matrices_of_a_block():
    ours = [torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0]]), torch.tensor([[1.0, 1], [0, 0]])]
    theirs = [torch.tensor([[0.0, 5, 0, 0]] * 3), torch.tensor([[1.0, 1], [2, 0], [-1, -1]])]

    whole = weight_cosines([(pair,) for pair in zip(ours, theirs, strict=True)])
    pieces = weight_cosines(
        zip(own.split(1, dim=1), other.split(1, dim=1), strict=True)
        for own, other in zip(ours, theirs, strict=True)
    )

    assert whole == pytest.approx(np.array([[0.5, 0.5**1.5, -0.5], [0.5, 0.5, 0.5]]))
    assert pieces == pytest.approx(whole)


SIMILARITIES = st.integers(1, 4).flatmap(
    lambda n: st.integers(n, 7).flatmap(
        lambda m: arrays(np.float64, (n, m), elements=st.integers(-8, 8).map(lambda i: i / 8))
    )
)


@settings(max_examples=60)
@given(SIMILARITIES)
def test_the_alignment_is_the_best_of_all_monotone_ones(similarity):
    n_shallow, n_deep = similarity.shape

    def total(places):
        return sum(similarity[k, place] for k, place in enumerate(places))

    found = align_segments(similarity)

    assert list(found) == sorted(set(found))
    assert total(found) == max(map(total, combinations(range(n_deep), n_shallow)))


def test_a_tie_is_taken_nearer_to_the_embeddings():
    similarity = np.array([[1, 1, 0, 0], [0, 0, 0.5, 0.5]])

    assert align_segments(similarity) == (0, 2)


def test_the_last_digits_decide_nothing():
    """CKA is computed in float32, which processors round differently."""
    similarity = np.array([[1 - 1e-7, 1, 0, 0], [0, 0, 0.5, 0.5 + 1e-7]])

    assert align_segments(similarity) == (0, 2)


def test_a_worked_example_of_segments():
    """The segments of the deeper model are [0, 1], [2] and [3, 4]: each ends with its match."""
    similarity = np.array(
        [[0.8, 0.9, 0.3, 0.2, 0.1], [0.5, 0.6, 0.8, 0.6, 0.4], [0.1, 0.2, 0.5, 0.6, 0.9]]
    )

    assert align_segments(similarity) == (1, 2, 4)
    assert match_blocks(similarity) == (1, 2, 4)  # the reference is the shallower one
    assert match_blocks(similarity.T) == (None, 0, 1, None, 2)


def test_models_of_equal_depth_keep_their_blocks():
    similarity = np.random.default_rng(0).normal(size=(4, 4))

    assert match_blocks(similarity) == (0, 1, 2, 3)
