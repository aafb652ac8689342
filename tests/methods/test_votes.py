import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lewis_hub.kernels.random_bits import below, halves, stream
from lewis_hub.methods.votes import drop, n_kept, trim


def naive_trim(values, density):
    """From the description, entry by entry."""
    n = len(values)
    k = 0 if density == 0 or n == 0 else min(n, max(1, round(density * n)))
    threshold = sorted((abs(v) for v in values), reverse=True)[k - 1] if k else math.inf
    wanted = k - sum(abs(v) > threshold for v in values)
    tied = sum(abs(v) == threshold for v in values)
    kept, j = [], 0
    for value in values:
        if abs(value) > threshold:
            kept.append(value)
        elif abs(value) == threshold:
            chosen = (j + 1) * wanted // tied > j * wanted // tied
            kept.append(value if chosen else 0.0)
            j += 1
        else:
            kept.append(0.0)
    return kept


FEW = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0, 1e-45, -1e-45, 1e-38, 3e38])
MANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.lists(FEW | MANY, max_size=40), st.floats(0, 1))
@example([1.0] * 10, 0.3)
@example([0.0] * 7, 0.5)
@example([-0.0, 0.0, 1.0], 0.5)
@example([1e-45, -1e-45, 0.0, 1e-45], 0.5)
@example([], 0.5)
@example([2.0], 1e-9)
def test_trim_is_what_its_description_says(values, density):
    vector = torch.tensor(values, dtype=torch.float32)

    assert trim(vector, density).tolist() == naive_trim(vector.tolist(), density)


@pytest.mark.parametrize(
    ("n", "density", "k"),
    [(10, 0.25, 2), (10, 0.35, 4), (4, 0.625, 2), (1, 0.001, 1), (3, 0.0, 0), (0, 0.5, 0)],
)
def test_k_rounds_halves_to_even_and_keeps_at_least_one(n, density, k):
    assert n_kept(n, density) == k


def test_tied_entries_are_kept_evenly_spread():
    kept = trim(torch.ones(10), 0.3)

    assert kept.nonzero().flatten().tolist() == [3, 6, 9]


def test_entries_above_the_threshold_are_kept_whatever_is_tied():
    kept = trim(torch.tensor([1.0, -3.0, 1.0, 1.0, 2.0, -1.0]), 0.67)

    assert kept.tolist() == [0.0, -3.0, 1.0, 0.0, 2.0, -1.0]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3, 4)])
def test_trim_keeps_the_shape(shape):
    assert trim(torch.full(shape, 2.0), 0.5).shape == shape


def test_trim_works_in_float64():
    values = torch.tensor([1.0, 1.0 + 1e-12, 0.5], dtype=torch.float64)

    assert trim(values, 0.3).tolist() == [0.0, 1.0 + 1e-12, 0.0]


def test_bits_are_those_of_splitmix64():
    # the first outputs for the seed 1234567, as published with the reference implementation
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]

    drawn = halves(1234567, 6)

    assert [int(w) & 0xFFFFFFFF for w in words] == drawn[::2].tolist()
    assert [int(w) >> 32 for w in words] == drawn[1::2].tolist()


def test_streams_differ_by_seed_tensor_and_expert():
    found = {stream(s, t, e) for s in (0, 1) for t in ("a", "a1") for e in (0, 1, 11)}

    assert len(found) == 12


def test_the_first_bits_do_not_depend_on_how_many_are_drawn():
    assert np.array_equal(halves(5, 1001)[:500], halves(5, 500))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_drop_keeps_about_the_density(density):
    n = 200_000

    kept = int((drop(torch.ones(n), density, stream(1, "a", 0)) != 0).sum())

    assert abs(kept - density * n) < 5 * math.sqrt(n * density * (1 - density))


def test_a_larger_density_keeps_what_a_smaller_one_keeps():
    values = torch.arange(1, 1001, dtype=torch.float32)
    few, many = (drop(values, density, 99) != 0 for density in (0.3, 0.6))

    assert bool((few <= many).all())


def test_density_zero_and_one_are_exact():
    assert (below(0.0), below(1.0)) == (0, 1 << 32)
    assert drop(torch.ones(99), 0.0, 3).sum() == 0
    assert drop(torch.ones(99), 1.0, 3).sum() == 99
