"""RAM and RAM+ against the formulas of the paper, entry by entry."""

import pytest
import torch

from lewis_hub.methods.ram import ram, ramplus_tl


def naive(base, task_vectors, r, alpha, epsilon):
    """One entry at a time; `r` 0 is RAM."""
    vectors = [vector.flatten().tolist() for vector in task_vectors]
    columns = list(zip(*vectors, strict=True))
    changers = [[i for i, value in enumerate(c) if abs(value) > epsilon] for c in columns]
    factors = []
    for i in range(len(vectors)):
        shared = sum(1 for own in changers if i in own and len(own) > 1)
        alone = sum(1 for own in changers if own == [i])
        factors.append(1 + r * min(shared / max(alone, epsilon), alpha))
    found = []
    for start, column, own in zip(base.flatten().tolist(), columns, changers, strict=True):
        if len(own) == 1:
            start += factors[own[0]] * column[own[0]]
        elif own:
            start += sum(column[i] for i in own) / len(own)
        found.append(start)
    return torch.tensor(found, dtype=base.dtype).view(base.shape)


def sparse_task_vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    return vectors * (torch.rand(3, 4, 5, generator=generator) < 0.4)


def test_ram_averages_what_several_changed_and_keeps_what_one_changed():
    base = torch.full((4,), 10.0)
    task_vectors = torch.tensor([[2.0, 1.0, 0.0, 5e-6], [4.0, 0.0, 0.0, -3.0]])

    merged = ram(base, task_vectors)

    # both: mean of 2 and 4 | one alone | nobody | 5e-6 is no change, so -3 is alone
    assert merged.tolist() == [13.0, 11.0, 10.0, 7.0]


def test_ram_plus_enlarges_what_one_changed_by_its_share_of_shared_entries():
    base = torch.zeros(6)
    task_vectors = torch.tensor([[1.0, 2, 2, 2, 2, 0], [3.0, 0, 0, 0, 0, 4]])

    merged = ramplus_tl(base, task_vectors, r=0.5, alpha=0.6)

    # the first shares 1 of 5 entries: 1 + 0.5 * 1/4; the second 1 of 2: 1 + 0.5 * min(1, 0.6)
    assert merged.tolist() == pytest.approx([2.0, 2.25, 2.25, 2.25, 2.25, 5.2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_both_are_the_formulas_entry_by_entry(seed, epsilon):
    vectors = sparse_task_vectors(seed)
    base = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)

    torch.testing.assert_close(
        ram(base, vectors, epsilon=epsilon), naive(base, vectors, 0.0, 0.0, epsilon)
    )
    torch.testing.assert_close(
        ramplus_tl(base, vectors, r=0.3, alpha=0.4, epsilon=epsilon),
        naive(base, vectors, 0.3, 0.4, epsilon),
    )


def test_where_all_is_shared_nothing_is_enlarged():
    vectors = torch.ones(2, 3)

    assert torch.equal(ramplus_tl(torch.zeros(3), vectors, r=9.0), torch.ones(3))
