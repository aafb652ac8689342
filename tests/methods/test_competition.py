"""CABS and PCB-Merging."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.selection import cabs, pcb
from lewis_hub.methods.votes import n_kept

BASE = torch.full((4,), 10.0)
ONES = torch.ones(2)
VECTORS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [5.0, -6.0, 1.0, 0.5]])


def test_an_expert_leaves_what_earlier_ones_keep():
    merged = cabs(BASE, VECTORS, weights=torch.tensor([1.0, 2.0]), densities=[0.5, 0.5], group=4)

    # the first keeps 4 and 3, so the second keeps 1 and 0.5, twice
    assert merged.tolist() == [14.0, 13.0, 12.0, 11.0]


def test_an_expert_that_wants_more_than_is_free_overlaps_with_its_largest():
    merged = cabs(BASE, VECTORS, weights=ONES, densities=[0.5, 0.75], group=4, lambda_=0.5)

    # the second keeps 1, 0.5 and then -6
    assert merged.tolist() == [12.0, 10.0 + 0.5 * (3 - 6), 10.5, 10.25]


def test_every_group_keeps_its_own_largest():
    vector = torch.tensor([[9.0, 8.0, 1.0, 2.0, 5.0]])

    merged = cabs(torch.zeros(5), vector, weights=torch.ones(1), densities=[0.5], group=2)

    # one of two, one of two, and one of the last alone
    assert merged.tolist() == [9.0, 0.0, 0.0, 2.0, 5.0]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40))
def test_densities_that_fit_do_not_overlap(seed, group, n):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(1, 4, (2, n), generator=generator).float()
    wide = torch.tensor([1.0, 100.0])  # tells whose an entry is

    merged = cabs(torch.zeros(n), vectors, weights=wide, densities=[0.3, 0.3], group=group)

    sizes = [group] * (n // group) + [n % group] * bool(n % group)
    each = sum(n_kept(size, 0.3) for size in sizes)
    firsts, seconds = merged % 100, merged // 100
    assert int((firsts > 0).sum()) == int((seconds > 0).sum()) == each
    overlap = sum(max(0, 2 * n_kept(size, 0.3) - size) for size in sizes)
    assert int(((firsts > 0) & (seconds > 0)).sum()) == overlap


def test_pcb_averages_by_scores_within_and_among_experts():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0]])

    merged = pcb(torch.zeros(2), vectors, weights=ONES, densities=[1, 1])

    # the first: within (e^2, 1) / (e^2 + 1), among twice (e, 1) / (e + 1)
    # the second has equal squares: within (1/2, 1/2), among (e, 1) / (e + 1) + (1/2, 1/2)
    e = math.e
    first = 1 / (e**2 + 1) * 2 / (e + 1)
    second = 0.5 * (1 / (e + 1) + 0.5)
    assert merged.tolist() == pytest.approx([1.0, second / (first + second)])


def test_pcb_drops_low_scores():
    vector = torch.tensor([[3.0, -1.0, 2.0, 0.5]])

    merged = pcb(torch.zeros(4), vector, weights=torch.tensor([2.0]), densities=[0.5])

    # one expert competes with itself: its two largest stay
    assert merged.tolist() == [6.0, 0.0, 4.0, 0.0]


def test_pcb_of_equal_experts_is_the_expert():
    vector = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    given = {"weights": torch.ones(4), "densities": [1.0] * 4}

    torch.testing.assert_close(pcb(torch.zeros(3, 5), vector.expand(4, 3, 5), **given), vector)
