import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.selection import sce

BASE = torch.full((3,), 10.0)


def test_sources_weigh_by_their_squares_and_the_minority_is_erased():
    vectors = torch.tensor([[3.0, -1.0, 2.0], [1.0, 2.0, -2.0]])

    merged = sce(BASE, vectors, densities=[1, 1])

    # squares 14 and 9: (14 * 3 + 9 * 1) / 23 | 2 outvotes -1 | a draw keeps the base
    assert merged.tolist() == pytest.approx([10 + 51 / 23, 12.0, 10.0])


def test_only_what_varies_most_is_selected_before_sources_are_weighed():
    vectors = torch.tensor([[3.0, -1.0, 4.0], [3.0, 2.0, 2.0]])

    merged = sce(BASE, vectors, densities=[1, 1], select_topk=0.5)

    # variances 0, 9/4 and 1: of the two that vary at all one is selected; 2 outvotes -1
    assert merged.tolist() == [10.0, 12.0, 10.0]


def test_a_density_is_a_sources_own_part_of_the_selection():
    vectors = torch.tensor([[3.0, -1.0, 4.0], [3.5, 2.0, 2.0]])

    merged = sce(BASE, vectors, densities=[1.0, 0.34])

    # variances 1/16, 9/4 and 1: the second keeps one entry of three: 2. Squares 26 and 4
    assert merged.tolist() == [13.0, 12.0, 14.0]


def test_short_task_vectors_weigh_like_long_ones():
    vectors = 1e-5 * torch.tensor([[3.0, -1.0, 2.0], [1.0, 2.0, -2.0]])

    merged = sce(torch.zeros(3), vectors, densities=[1, 1])

    assert (1e5 * merged).tolist() == pytest.approx([51 / 23, 2.0, 0.0])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.25, 0.5, 1.0]))
def test_the_order_of_the_models_does_not_matter(seed, share):
    generator = torch.Generator().manual_seed(seed)
    base, *vectors = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64)
    vectors = torch.stack(vectors)

    one, other = (
        sce(base, v, densities=[1, 1, 1], select_topk=share) for v in (vectors, vectors[[1, 2, 0]])
    )

    torch.testing.assert_close(one, other)
