"""Orthogonal matching pursuit against a plain loop over the definition."""

import numpy as np
import pytest
import torch

from lewis_hub.merge.matching_pursuit import N_TOGETHER, pursue
from lewis_hub.merge.runners import Runner, threads


def naive(target, atoms, k):
    """Choose the atom with the largest inner product, then fit all chosen ones anew."""
    chosen, residual = [], target
    for _ in range(k):
        products = np.abs(atoms @ residual)
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        fitted = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        residual = target - fitted @ atoms[chosen]
    return chosen, fitted, float(np.linalg.norm(residual) / np.linalg.norm(target))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_it_is_what_a_plain_loop_finds(k):
    targets, atoms = drawn(9, 24, seed=1), drawn(50, 24, seed=2) + 0.5  # atoms are alike

    found = pursue(targets, atoms, k, Runner(), lambda _: None)

    for n, target in enumerate(targets.double().numpy()):
        chosen, fitted, error = naive(target, atoms.double().numpy(), k)
        assert found.indices[n].tolist() == chosen
        np.testing.assert_allclose(found.coefficients[n], fitted, rtol=1e-3, atol=1e-4)
        assert float(found.errors[n]) == pytest.approx(error, rel=1e-3)


def test_a_worked_example():
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    target = torch.tensor([[3.0, 2.5, 1.0]])

    # inner products 3, 5 and 5.5: the third first; then 0.25 against -0.5, the second
    found = pursue(target, atoms, 2, Runner(), lambda _: None)

    assert found.indices.tolist() == [[2, 1]]
    # 3 (1, 1, 0) - 0.25 (0, 2, 0) = (3, 2.5, 0)
    torch.testing.assert_close(found.coefficients, torch.tensor([[3.0, -0.25]]))
    assert float(found.errors[0]) == pytest.approx(1 / (9 + 6.25 + 1) ** 0.5)


def test_it_ends_where_nothing_is_left():
    atoms = torch.eye(4)
    targets = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])

    found = pursue(targets, atoms, 3, Runner(), lambda _: None)

    assert found.indices.tolist() == [[1, 0, 0], [0, 0, 0], [3, 2, 1]]
    assert found.coefficients.tolist() == [[5, 0, 0], [0, 0, 0], [4, 3, 2]]
    assert found.errors.tolist() == [0, 0, pytest.approx(1 / 30**0.5)]


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_numbers_whose_squares_float32_has_not_give_the_same_combinations(scale):
    targets, atoms = drawn(3, 8, seed=1), drawn(20, 8, seed=2)
    expected = pursue(targets, atoms, 4, Runner(), lambda _: None)

    found = pursue(targets * scale, atoms * scale, 4, Runner(), lambda _: None)

    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.coefficients, expected.coefficients)
    torch.testing.assert_close(found.errors, expected.errors)


def test_atoms_that_repeat_others_are_not_chosen():
    atom = drawn(1, 8, seed=3)
    atoms = torch.cat([atom, atom, 2 * atom])
    target = atom + 0.1 * drawn(1, 8, seed=4)

    found = pursue(target, atoms, 3, Runner(), lambda _: None)

    assert int(found.indices[0, 0]) == 2
    assert found.coefficients[0, 1:].tolist() == [0, 0]
    expected = float((target @ atoms[2]) / (atoms[2] @ atoms[2]))
    assert float(found.coefficients[0, 0]) == pytest.approx(expected)


def test_more_atoms_than_dimensions_or_vocabulary_are_of_no_use():
    found = pursue(drawn(3, 5), drawn(40, 5, seed=1), 64, Runner(), lambda _: None)
    few = pursue(drawn(3, 5), drawn(2, 5, seed=1), 64, Runner(), lambda _: None)

    assert found.indices.shape == (3, 5)
    assert found.errors.max() < 1e-5
    assert few.indices.shape == (3, 2)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    targets, atoms = drawn(3 * N_TOGETHER + 7, 48, seed=5), drawn(300, 48, seed=6)
    done = []

    alone = pursue(targets, atoms, 16, Runner(), done.append)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = pursue(targets, atoms, 16, threads(3), lambda _: None)
    finally:
        torch.set_num_threads(before)

    assert sum(done) == len(targets)
    assert torch.equal(alone.indices, shared.indices)
    assert torch.equal(alone.coefficients, shared.coefficients)
    assert torch.equal(alone.errors, shared.errors)
