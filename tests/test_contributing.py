"""The examples in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest
import torch

from lewis_hub.guides import registry as guides
from lewis_hub.guides.registry import Measurements
from lewis_hub.methods import registry as methods

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """Undo all registrations after the test."""
    for registry in (guides._registry, methods._registry):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def run(name):
    """Run the example with the file name `name`; returns its lines."""
    (code,) = re.findall(rf"```python\n(# my_package/{name}.py\n.*?)```", TEXT, re.DOTALL)
    exec(compile(code, f"my_package/{name}.py", "exec"), {"__name__": f"my_package.{name}"})
    return code.splitlines()


def test_the_example_of_a_method_keeps_the_largest_change():
    lines = run("boldest")
    method = methods.find("boldest")
    task_vectors = torch.tensor([[3.0, -1.0, 0.5], [1.0, 4.0, -8.0]])

    merged = method.function(
        torch.full((3,), 10.0), task_vectors, weights=torch.tensor([1.0, 0.5]), lambda_=2.0
    )

    assert len(lines) <= 20
    assert merged.tolist() == [16.0, 14.0, 2.0]  # of 3 and 0.5 | -1 and 2 | 0.5 and -4, twice
    assert method.options == {"lambda": 1.0}
    assert (
        method.summary == "Keep, for each entry, the weighted task vector with the largest change."
    )
    assert '[project.entry-points."lewis_hub.methods"]\nboldest = "my_package.boldest"' in TEXT


def test_the_example_of_a_guide_sets_three_densities():
    lines = run("steps")
    moved = {f"l.{i}.q": value for i, value in enumerate([0.5, 0.1, 0.9, 0.2, 0.3, 0.4])}

    guide = guides.find("steps")

    assert len(lines) <= 20
    assert guide.decide(Measurements((), {}, {"task_vector": moved}), 0.2, 0.8) == {
        "l.1.q": 0.2,
        "l.3.q": 0.2,
        "l.4.q": 0.5,
        "l.5.q": 0.5,
        "l.0.q": 0.8,
        "l.2.q": 0.8,
    }
    assert not guide.needs_texts
