"""The examples of CONTRIBUTING.md, as they stand there."""

import re
from pathlib import Path

import pytest

from lewis_hub.guides import registry
from lewis_hub.guides.registry import Statistics, find

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations that end with the test."""
    monkeypatch.setattr(registry._registry, "_entries", dict(registry._registry._entries))


def test_the_guide_of_the_example_works(own_registry):
    (code,) = re.findall(r"```python\n(# my_package/steps.py\n.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "my_package/steps.py", "exec"), {"__name__": "my_package.steps"})
    moved = {f"l.{i}.q": value for i, value in enumerate([0.5, 0.1, 0.9, 0.2, 0.3, 0.4])}

    guide = find("steps")

    assert len(code.splitlines()) <= 20
    assert guide.decide(Statistics((), {}, {"task_vector": moved}), 0.2, 0.8) == {
        "l.1.q": 0.2,
        "l.3.q": 0.2,
        "l.4.q": 0.5,
        "l.5.q": 0.5,
        "l.0.q": 0.8,
        "l.2.q": 0.8,
    }
    assert not guide.needs_texts
