"""How long work says how far it is; the caller owns what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Advance = Callable[[int], None]  # called with the units done since the last call
Unit = Literal["bytes", "tokens", "items"]


class Progress(Protocol):
    """A place to report to: one stage at a time."""

    def stage(self, title: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units; leave it when the work is done or has failed."""

    def say(self, text: str) -> None:
        """Tell the user something that is no error and needs no answer."""


class Silent:
    """Reports to nobody."""

    @contextmanager
    def stage(self, title: str, total: int, unit: Unit) -> Iterator[Advance]:  # noqa: ARG002
        """Count nothing."""
        yield lambda _: None

    def say(self, text: str) -> None:
        """Say nothing."""


def shared(advance: Advance, n_passes: int) -> Advance:
    """Tell the units of all passes as if there were one."""
    done, told = 0, 0

    def advance_share(n: int) -> None:
        nonlocal done, told
        done += n
        advance(done // n_passes - told)
        told = done // n_passes

    return advance_share
