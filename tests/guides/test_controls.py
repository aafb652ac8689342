from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.checkpoint import names
from lewis_hub.guides.baselines import inverse, random
from lewis_hub.guides.lewis import lewis
from lewis_hub.guides.registry import Measurements, find

Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


def measured(values: dict[str, list[float]], seed: int = 0) -> Measurements:
    expert = {c.format(b): v for c, row in values.items() for b, v in enumerate(row)}
    return Measurements((), {"lewis": dict.fromkeys(expert, 0.0)}, {"lewis": expert}, seed)


WORKED = measured({Q: [1, 3, 6, 2, 8, 4], DOWN: [5, 0, 5, 1, 2, 3]}, seed=7)


def test_inverse_turns_the_densities_of_lewis_upside_down():
    upright, found = lewis(WORKED, 0.3, 0.8), inverse(WORKED, 0.3, 0.8)

    assert list(found) == list(upright)
    assert all(found[m] == pytest.approx(1.1 - upright[m]) for m in found)
    assert min(found.values()) == pytest.approx(0.3)
    assert max(found.values()) == pytest.approx(0.8)


def test_random_deals_the_densities_of_lewis_out_anew():
    # by hand: blake2b of "7 <module>", 16 bytes, in ascending order gives who hands on to whom
    found = random(WORKED, 0.3, 0.8)

    assert found != lewis(WORKED, 0.3, 0.8)
    assert random(WORKED, 0.3, 0.8) == found


rows = st.lists(st.floats(0, 100), min_size=6, max_size=6)


@given(rows, rows, st.integers(0, 2**63))
def test_random_keeps_the_densities_of_each_component(q, down, seed):
    statistics = measured({Q: q, DOWN: down}, seed)
    upright, found = lewis(statistics, 0.3, 0.8), random(statistics, 0.3, 0.8)

    assert list(found) == list(upright)
    for component in (Q, DOWN):
        own = [m for m in found if names.component(m) == names.component(component.format(0))]
        assert sorted(found[m] for m in own) == sorted(upright[m] for m in own)


def test_random_differs_from_seed_to_seed_and_stays_in_a_new_process():
    seeds = [random(measured({Q: [*range(12)]}, seed), 0.3, 0.8) for seed in range(5)]
    code = (
        "from lewis_hub.guides.baselines import random\n"
        "from lewis_hub.guides.registry import Measurements\n"
        "m = {f'model.layers.{b}.self_attn.q_proj': float(b) for b in range(12)}\n"
        "s = Measurements((), {'lewis': dict.fromkeys(m, 0.0)}, {'lewis': m}, 3)\n"
        "print(list(random(s, 0.3, 0.8).values()))"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert len({tuple(one.values()) for one in seeds}) == 5
    assert run.stdout == f"{list(seeds[3].values())}\n"


@given(rows, st.floats(0.05, 0.4), st.floats(0.5, 1))
def test_controls_stay_within_the_bounds(q, gamma, epsilon):
    for guide in ("inverse", "random"):
        found = find(guide).decide(measured({Q: q}), gamma, epsilon)
        assert all(gamma <= density <= epsilon for density in found.values())
