"""How much the tests of this folder do: `effort` is 1 in the gate, and larger at night."""

import os

import pytest


@pytest.fixture(scope="session")
def effort() -> int:
    """How many times as much a test does than in the gate."""
    return int(os.environ.get("LEWIS_HUB_LONG", "1"))


@pytest.fixture(scope="session")
def first_seed() -> int:
    """Where the seeds of drawn cases begin; the gate draws the same each time."""
    return int(os.environ.get("LEWIS_HUB_SEED", "0"))
