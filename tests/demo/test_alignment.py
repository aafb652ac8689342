"""The loss between two models that were trained from different seeds."""

import json

import alignment
import pytest
from train_zoo import Stage, muon

FEW = Stage(None, 120, 32, muon(2e-2, 3e-3))
HALF = (0.0, 0.5, 1.0)


@pytest.mark.slow
def test_aligned_models_have_a_lower_barrier_than_those_as_they_are(tmp_path):
    alignment.make(tmp_path, FEW)
    one, two = (alignment.load(tmp_path / name) for name in ("one", "two"))

    naive = alignment.between(one, two, "tune", HALF)
    aligned = alignment.between(one, alignment.aligned(tmp_path, 0.5), "tune", HALF)

    assert aligned[1.0] == pytest.approx(naive[1.0], abs=1e-4)  # the same model, permuted
    assert alignment.barrier(aligned) < alignment.barrier(naive)
    file = tmp_path / "aligned-0.5" / "lewis" / "alignment.json"
    [two] = json.loads(file.read_text(encoding="utf-8"))["models"]
    assert two["similarity"]["residual"]["after"] > two["similarity"]["residual"]["before"]


def test_the_barrier_is_the_highest_loss_above_the_line_between_both_ends():
    assert alignment.barrier({0.0: 1.0, 0.25: 2.0, 0.5: 2.5, 1.0: 2.0}) == 1.0
    assert alignment.barrier({0.0: 1.0, 0.5: 1.2, 1.0: 2.0}) == 0.0
