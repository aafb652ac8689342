"""Multi-SLERP and the Karcher mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.methods.averages import karcher, multislerp

ROOT = math.sqrt(2)
SEEDS = st.integers(0, 2**32)
UNEQUAL = torch.tensor([[1.0, 0.0], [0.0, 3.0]])


def random_models(seed, n=3, size=7):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    return common + 0.5 * torch.randn(n, size, generator=generator, dtype=torch.float64)


def naive_karcher(models):
    """Gradient descent on the vectors themselves, until it stands still."""
    lengths = models.norm(dim=1)
    units = models / lengths[:, None]
    mean = units.mean(dim=0) / units.mean(dim=0).norm()
    for _ in range(200):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (unit @ mean).clamp(-1, 1)
            angle = cosine.acos()
            if angle > 1e-12:
                tangent += angle / angle.sin() * (unit - cosine * mean) / len(units)
        step = tangent.norm()
        if step < 1e-12:
            break
        mean = step.cos() * mean + step.sin() * tangent / step
    return lengths.mean() * mean


def mergekits_multislerp(models, weights):
    """Its steps, tangent plane and all."""
    weights = weights / weights.sum()
    lengths = models.norm(dim=1)
    units = models / lengths[:, None]
    mean = weights @ units
    mean = mean / mean.norm()
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    step = tangent.norm() + 1e-8
    turned = mean * step.cos() + tangent * step.sin() / step
    return turned * (weights @ lengths)


def test_the_karcher_mean_of_two_lies_half_way_at_their_mean_length():
    # at 45 degrees, (1 + 3) / 2 long
    assert karcher(UNEQUAL).tolist() == pytest.approx([ROOT, ROOT])


def test_a_model_of_zeros_has_a_length_but_no_direction():
    assert karcher(torch.tensor([[0.0, 0.0], [0.0, 2.0]])).tolist() == [0.0, 1.0]
    assert karcher(torch.zeros(3, 2)).tolist() == [0.0, 0.0]


def test_of_opposite_models_the_first_gives_the_direction():
    assert karcher(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).tolist() == [2.0, 0.0]


@settings(deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_the_karcher_mean_is_where_descent_on_the_vectors_ends(seed, n):
    models = random_models(seed, n)

    torch.testing.assert_close(
        karcher(models, max_iter=200, tol=1e-7), naive_karcher(models), rtol=1e-5, atol=1e-5
    )


@settings(deadline=None)
@given(SEEDS, st.integers(1, 8))
def test_the_mean_of_equal_models_is_the_model(seed, n):
    model = random_models(seed, 1)[0].float()

    torch.testing.assert_close(karcher(model.expand(n, -1)), model)
    shares = torch.arange(1.0, n + 1)
    merged = multislerp(torch.zeros_like(model), model.expand(n, -1), weights=shares)
    torch.testing.assert_close(merged, model)


@settings(deadline=None)
@given(SEEDS)
def test_the_order_of_the_models_does_not_matter(seed):
    models, weights = random_models(seed), torch.tensor([0.2, 0.3, 0.9]).double()
    order, base = torch.tensor([2, 0, 1]), torch.zeros(7).double()

    torch.testing.assert_close(karcher(models[order]), karcher(models))
    torch.testing.assert_close(
        multislerp(base, models[order], weights=weights[order]),
        multislerp(base, models, weights=weights),
    )


def test_multislerp_has_the_weighted_direction_and_the_weighted_length():
    merged = multislerp(torch.zeros(2), UNEQUAL, weights=torch.tensor([3.0, 1.0]))

    # along (3/4, 1/4), 3/4 * 1 + 1/4 * 3 = 3/2 long
    expected = [1.5 * 3 / math.sqrt(10), 1.5 / math.sqrt(10)]
    assert merged.tolist() == pytest.approx(expected)


def test_multislerp_turns_task_vectors_around_the_base():
    base = torch.tensor([10.0, 20.0])

    merged = multislerp(base, base + UNEQUAL, weights=torch.ones(2))

    assert merged.tolist() == pytest.approx([10 + ROOT, 20 + ROOT])


def test_weights_that_are_not_normalized_scale_the_length():
    merged = multislerp(torch.zeros(2), UNEQUAL, weights=torch.ones(2), normalize_weights=False)

    # along (1, 1), 1 + 3 long
    assert merged.tolist() == pytest.approx([2 * ROOT, 2 * ROOT])


def test_directions_that_cancel_leave_the_weighted_sum():
    base = torch.full((2,), 10.0)
    vectors = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])

    merged = multislerp(base, base + vectors, weights=torch.ones(3))

    # (4 - 1 + 0) / 3
    assert merged.tolist() == pytest.approx([11.0, 10.0])


@settings(deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_multislerp_ends_where_mergekits_steps_end(seed, n):
    models = random_models(seed, n)
    weights = torch.linspace(0.2, 1.5, n).double()

    merged = multislerp(torch.zeros(7).double(), models, weights=weights)

    torch.testing.assert_close(merged, mergekits_multislerp(models, weights), rtol=1e-6, atol=1e-6)
