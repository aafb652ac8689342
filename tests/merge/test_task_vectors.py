import pytest
import torch

from lewis_hub.merge.runners import Runner, threads
from lewis_hub.merge.task_vectors import PIECE, fit, relative_changes
from lewis_hub.methods.numerics import torch_threads

A, B = "model.layers.0.q.weight", "model.layers.1.q.weight"


@pytest.fixture
def changes(zoo):
    def measure(base, expert, tensors, runner=None):
        with (
            zoo.reader(base.label, base.checkpoint.base) as first,
            zoo.reader(expert.label, expert.checkpoint.base) as second,
        ):
            seen = []
            found = relative_changes(
                (base.checkpoint, first),
                (expert.checkpoint, second),
                tensors,
                runner or Runner(),
                seen.append,
            )
        assert sum(seen) == sum(base.checkpoint.tensors[name].n_elements for name in tensors)
        return found

    return measure


def test_a_worked_example(zoo, changes):
    base = zoo.source("base", {A: torch.tensor([[3.0, 0.0], [0.0, 4.0]]), B: torch.ones(2, 2)})
    expert = zoo.source("expert", {A: torch.tensor([[3.0, 1.0], [0.0, 4.0]]), B: torch.ones(2, 2)})

    # ‖[[0, 1], [0, 0]]‖ / ‖[[3, 0], [0, 4]]‖ = 1 / 5
    assert changes(base, expert, [B, A]) == {B: 0.0, A: pytest.approx(0.2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_what_torch_finds_whatever_the_dtype_and_the_pieces(zoo, changes, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (3, PIECE // 2 + 7)  # of more than one piece
    before = torch.randn(shape, generator=generator).to(dtype)
    after = (before.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    base, expert = zoo.source("base", {A: before}), zoo.source("expert", {A: after})

    found = changes(base, expert, [A])
    wide = before.double()
    assert found[A] == pytest.approx(float((after.double() - wide).norm() / wide.norm()))
    assert changes(base, expert, [A], threads(3)) == found


def test_an_adapters_expert_is_measured_as_it_is_merged(zoo, changes):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4, generator=generator)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator)
    base = zoo.source("base", {A: weight, B: weight.clone()})
    prefix = "base_model.model.model.layers.0.q"
    stored = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    expert = zoo.adapter("expert", base, stored, r=2, lora_alpha=4)

    found = changes(base, expert, [A, B])

    assert found == {A: pytest.approx(float((2 * b @ a).norm() / weight.norm())), B: 0.0}


def test_what_is_missing_or_not_finite_counts_for_nothing(zoo, changes):
    base = zoo.source("base", {A: torch.tensor([[1.0, 2.0]]), B: torch.zeros(1, 2)})
    expert = zoo.source("expert", {A: torch.tensor([[float("nan"), 3.0]])})
    moved = zoo.source("moved", {A: torch.tensor([[1.0, 2.0]]), B: torch.ones(1, 2)})

    assert changes(base, expert, [A, B]) == {A: pytest.approx(1 / 5**0.5), B: 0.0}
    assert changes(base, moved, [A, B]) == {A: 0.0, B: 1.0}


def spectrum(rows, columns, values, seed=0):
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator)).Q
    return left @ torch.diag(torch.tensor(values)) @ right.T


def best(values, rank):
    squares = [value**2 for value in values]
    return (sum(squares[rank:]) / sum(squares)) ** 0.5


FALLING = [0.8**i for i in range(60)]


@pytest.mark.parametrize(("rows", "columns"), [(200, 90), (90, 200), (60, 60)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_fit_of_a_rank_misses_no_more_than_the_best(rows, columns, rank):
    matrix = spectrum(rows, columns, FALLING)

    found = fit(matrix, rank, 0.0, torch.float32)

    assert found.rank == rank
    assert found.error == pytest.approx(best(FALLING, rank), rel=1e-3)
    rest = matrix - found.left @ found.right
    assert found.error == pytest.approx(float(rest.norm() / matrix.norm()), rel=1e-5)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.03])
def test_an_error_takes_the_lowest_rank_within_it(error):
    found = fit(spectrum(200, 90, FALLING), 60, error, torch.float32)

    assert best(FALLING, found.rank) <= error < best(FALLING, found.rank - 1)


@pytest.mark.parametrize(("error", "stored"), [(0.03, torch.bfloat16), (0.001, torch.float32)])
def test_rounding_breaks_no_bound(error, stored):
    matrix = spectrum(200, 90, FALLING)

    found = fit(matrix, 60, error, torch.bfloat16)

    rest = matrix - found.left.float() @ found.right.float()
    assert float(rest.norm() / matrix.norm()) <= error
    assert found.left.dtype == found.right.dtype == stored


def test_the_highest_rank_is_not_exceeded_for_an_error():
    found = fit(spectrum(200, 90, FALLING), 3, 0.01, torch.float32)

    assert found.rank == 3
    assert found.error > 0.01


def test_a_matrix_of_low_rank_is_found_exactly_and_the_same_each_time():
    matrix = spectrum(300, 150, [3.0, 2.0, 1.0])

    first, again = (fit(matrix, 3, 0.0, torch.float32) for _ in range(2))

    assert first.error < 1e-5
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)


@pytest.mark.parametrize("rank", [3, 100])  # by iteration, and whole
@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_number_of_threads_changes_no_bit(rank, error):
    matrix = torch.randn(300, 150, generator=torch.Generator().manual_seed(1))

    found = []
    for n_threads in (1, 2):
        with torch_threads(n_threads):
            found.append(fit(matrix, rank, error, torch.float32))

    one, two = found
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.right, two.right)
    assert one.error == two.error


def test_the_error_counts_the_rounding_of_the_factors():
    found = fit(spectrum(300, 150, [3.0, 2.0, 1.0]), 3, 0.0, torch.bfloat16)

    assert 1e-4 < found.error < 1e-2
    assert found.left.dtype == found.right.dtype == torch.bfloat16
