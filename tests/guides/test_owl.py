from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.calibration.summaries import FAR, outlier_ratios
from lewis_hub.guides.baselines import owl
from lewis_hub.guides.registry import Measurements, find

Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


def test_a_worked_example():
    weights = {
        Q.format(0): torch.tensor([[1.0, -9.0], [1.0, 1.0]]),
        DOWN.format(0): torch.ones(4, 2),
        Q.format(1): torch.ones(2, 2),
    }
    norms = {module: torch.tensor([1.0, 2.0]) for module in weights}

    # block 0: scores 1 18 1 2 and four of 1, 2: sum 34, mean 34 / 12, five times that is 14.2
    assert outlier_ratios(weights, norms) == {
        Q.format(0): 1 / 12,
        DOWN.format(0): 1 / 12,
        Q.format(1): 0.0,
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_what_a_loop_over_all_entries_finds(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights, norms = {}, {}
    for b in range(2):
        for name, shape in ((Q.format(b), (3, 4)), (DOWN.format(b), (4, 5))):
            heavy = torch.randn(shape, generator=generator) ** 5  # heavy tails
            weights[name] = heavy.to(dtype)
            norms[name] = torch.rand(shape[1], generator=generator)

    found = outlier_ratios(weights, norms)

    for b in range(2):
        scores = []
        for name in (Q.format(b), DOWN.format(b)):
            for row in weights[name].tolist():
                scores += [abs(w) * a for w, a in zip(row, norms[name].tolist(), strict=True)]
        mean = sum(scores) / len(scores)
        ratio = sum(score > FAR * mean for score in scores) / len(scores)
        assert found[Q.format(b)] == found[DOWN.format(b)] == pytest.approx(ratio)


def test_all_modules_of_a_block_get_the_density_of_its_outliers():
    measured = {Q.format(0): 0.01, DOWN.format(0): 0.01, Q.format(1): 0.03, Q.format(2): 0.02}

    found = owl(Measurements((), {"outliers": {}}, {"outliers": measured}), 0.2, 0.8)

    assert found == {Q.format(0): 0.2, DOWN.format(0): 0.2, Q.format(1): 0.8, Q.format(2): 0.5}
    assert find("owl").needs == ("outliers",)
