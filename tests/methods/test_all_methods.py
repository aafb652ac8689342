"""What holds for every method: any shape, any density, any number of models, any threads."""

import pytest
import torch

from lewis_hub.methods.registry import find, methods

NAMES = [method.name for method in methods()]
SHAPES = [(), (1,), (0,), (0, 3), (3, 0), (5,), (2, 7), (2, 3, 4)]
DENSITIES = [0.0, 0.4, 1.0]


def numbers_of_experts(method):
    least, most = method.n_experts
    return [n for n in (1, 2, 3, 8) if n >= least and (most is None or n <= most)]


def grams(base, n):
    """Of a matrix second moments of more inputs than it has columns."""
    if base.dim() != 2 or not base.numel():
        return [None] * n
    generator = torch.Generator().manual_seed(2)
    width = base.shape[1]
    x = torch.randn(n, width + 3, width, generator=generator, dtype=torch.float64).to(base.dtype)
    return list((x.mT @ x)[:, None])


def merge(method, base, models, density=0.4):
    n = len(models)
    given = {
        "weights": torch.linspace(0.5, 1.0, n, dtype=base.dtype),
        "densities": [density] * n,
        "streams": range(n),
        "outliers": [0.1] * n,
        "spreads": [0.15] * n,
        "scales": [1.0] * n,
        "grams": grams(base, n),
    }
    keywords = {key: value for key, value in given.items() if method.takes(key)}
    keywords |= {key: 0.5 for key, default in method.options.items() if default is None}
    if not method.takes_base:
        return method.function(models, **keywords)
    return method.function(base, models - base if method.takes_task_vectors else models, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_merge_has_the_shape_and_the_dtype_of_its_models(name, shape, dtype):
    method, generator = find(name), torch.Generator().manual_seed(1)
    for n in numbers_of_experts(method):
        base, *models = torch.randn(n + 1, *shape, generator=generator, dtype=dtype)
        for density in DENSITIES:
            merged = merge(method, base, torch.stack(models), density)

            assert (merged.shape, merged.dtype) == (base.shape, dtype)
            assert bool(merged.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_a_definition_gives_what_it_gives_in_float32_and_more_digits(name):
    method, generator = find(name), torch.Generator().manual_seed(1)
    for n in numbers_of_experts(method):
        base, *models = torch.randn(n + 1, 12, 20, generator=generator, dtype=torch.float64)
        exact = merge(method, base, torch.stack(models))

        rounded = merge(method, base.float(), torch.stack(models).float())

        torch.testing.assert_close(rounded.double(), exact, rtol=1e-3, atol=1e-5)
        assert not torch.equal(rounded.double(), exact)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_did_not_move_from_the_base_are_the_base(name):
    method = find(name)
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for n in numbers_of_experts(method):
        for density in DENSITIES:
            merged = merge(method, base, base.expand(n, 4, 6), density)

            torch.testing.assert_close(merged, base)


@pytest.mark.parametrize("name", [method.name for method in methods() if method.takes_density])
def test_density_zero_leaves_the_base(name):
    method = find(name)
    base, *models = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

    assert torch.equal(merge(method, base, torch.stack(models), 0.0), base)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_the_same_on_any_number_of_threads(name):
    method, generator = find(name), torch.Generator().manual_seed(1)
    n = numbers_of_experts(method)[-1] if method.n_experts[1] else 3
    base, *models = torch.randn(n + 1, 300, 401, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 3, 4):
            torch.set_num_threads(n_threads)
            found.append(merge(method, base, torch.stack(models)))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
