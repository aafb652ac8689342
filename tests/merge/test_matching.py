"""Matching the units of two models, against naive references."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from lewis_hub.merge.matching import best_order, correlation, match_heads


def test_correlation_is_numpys_and_zero_for_constants():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(20, 3, generator=generator), torch.randn(20, 4, generator=generator)
    ours[:, 1] = 2.5

    found = correlation(ours, theirs)

    expected = np.corrcoef(ours[:, [0, 2]].numpy(), theirs.numpy(), rowvar=False)[:2, 2:]
    assert found[[0, 2]].numpy() == pytest.approx(expected, abs=1e-6)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_correlation_of_huge_activations_is_that_of_small_ones():
    """The sums of such numbers are infinite in float32."""
    ours, theirs = (torch.randn(50, 4, generator=torch.manual_seed(n)).abs() for n in (0, 1))

    found = correlation(ours * 2.0**125, theirs)

    assert torch.equal(found, correlation(ours, theirs))


def test_the_best_order_beats_all_others():
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))

    order = best_order(similarity)

    def total(order):
        return sum(float(similarity[i, j]) for i, j in enumerate(order))

    assert total(order) == pytest.approx(max(map(total, permutations(range(5)))))


def test_heads_move_whole_and_as_well_as_possible():
    """All orders of 3 heads, and of the 2 values of each, are tried."""
    generator = torch.Generator().manual_seed(2)
    kinds = ("query", "key", "value", "output")
    similarity = {kind: torch.randn(6, 6, generator=generator) for kind in kinds}

    found = match_heads(similarity, (3, 1, 2), rotary=True)

    def orders(heads, values):
        kept = [2 * head + i for head in heads for i in (0, 1)]
        moved = [2 * head + i for head, own in zip(heads, values, strict=True) for i in own]
        return dict(zip(kinds, (kept, kept, moved, moved), strict=True))

    def total(tried):
        return sum(
            float(similarity[kind][i, j]) for kind in kinds for i, j in enumerate(tried[kind])
        )

    within = [(0, 1), (1, 0)]
    tried = [orders(*one) for one in product(permutations(range(3)), product(*[within] * 3))]
    best = max(tried, key=total)
    assert {kind: order.tolist() for kind, order in found.items()} == best


def test_query_heads_stay_in_the_group_that_shares_their_keys():
    generator = torch.Generator().manual_seed(3)
    sizes = {"query": 8, "key": 4, "value": 4, "output": 8}
    similarity = {k: torch.randn(n, n, generator=generator) for k, n in sizes.items()}

    found = match_heads(similarity, (2, 2, 2), rotary=True)

    groups = [order // 2 for order in (found["key"][::2], found["value"][::2])]
    assert groups[0].tolist() == groups[1].tolist()
    for kind in ("query", "output"):
        heads = found[kind][::2] // 2
        assert (heads // 2).tolist() == groups[0].repeat(2).tolist()
        assert sorted(heads.tolist()) == [0, 1, 2, 3]
