import pytest
import torch

from lewis_hub.merge.runners import Runner, threads
from lewis_hub.merge.task_vectors import PIECE, relative_changes

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
