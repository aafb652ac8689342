"""What the matrices of wrong answers share: a proxy of the Hub, and pauses that are skipped."""

import pytest
from faulty_proxy import proxy

from lewis_hub.hub import answers


@pytest.fixture
def behind(hub):
    """A proxy of the Hub."""
    with proxy(hub) as stands:
        yield stands


@pytest.fixture
def pauses_s(monkeypatch):
    """The pauses that were asked for, and skipped; a slow answer is known after a moment."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(answers, "SPEED_AFTER_S", 0.3)
    return pauses
