from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.calibration.summaries import evenness
from lewis_hub.guides.baselines import OMEGA, aim
from lewis_hub.guides.registry import Decision, Measurements, find


def test_a_worked_example():
    norms = {
        "l.0.q": torch.tensor([4.0, 1.0, 1.0, 2.0]),
        "l.1.q": torch.ones(4),
        "l.2.q": torch.zeros(4),
    }
    even = evenness({}, norms)
    assert even == {"l.0.q": 0.5, "l.1.q": 1.0, "l.2.q": 1.0}

    found = aim(Measurements((), {"evenness": even}, {"evenness": {}}), 0.3, 0.8)

    # the mean over channels of 1 - .6 a / max a
    assert found.weights == {"l.0.q": pytest.approx(0.7), "l.1.q": 0.4, "l.2.q": 0.4}
    assert found.densities == {"l.0.q": 0.8, "l.1.q": 0.3, "l.2.q": 0.3}
    assert isinstance(found, Decision)
    assert find("aim").needs == ("evenness",)


@given(st.lists(st.floats(0.0625, 128, width=32), min_size=1, max_size=20))
def test_its_weight_is_the_mean_of_the_papers_factors(norms):
    even = evenness({}, {"l.0.q": torch.tensor(norms)})

    found = aim(Measurements((), {"evenness": even}, {"evenness": {}}), 0.3, 0.8)

    factors = [1 - (1 - OMEGA) * norm / max(norms) for norm in norms]
    assert found.weights["l.0.q"] == pytest.approx(sum(factors) / len(factors))
    assert OMEGA <= found.weights["l.0.q"] + 1e-12 <= 1
