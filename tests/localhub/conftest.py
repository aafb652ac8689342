"""Fixtures for tests of the embedded Hub: a client, and ways to fill and to break the Hub."""

from tests.hub.conftest import api, no_pauses, push

__all__ = ["api", "no_pauses", "push"]
