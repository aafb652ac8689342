"""How long-running work reports its progress; the caller decides what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Advance = Callable[[int], None]  # called with the units done since the last call
Unit = Literal["bytes", "tokens", "items"]


class Progress(Protocol):
    """Receives reports, one stage at a time."""

    def stage(self, title: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units; the context ends when the work is done or has failed."""

    def say(self, text: str) -> None:
        """Show the user a note that needs no answer."""


class Silent:
    """Ignores all reports."""

    @contextmanager
    def stage(self, title: str, total: int, unit: Unit) -> Iterator[Advance]:  # noqa: ARG002
        """Ignore the units."""
        yield lambda _: None

    def say(self, text: str) -> None:
        """Ignore the note."""


def shared(advance: Advance, n_passes: int) -> Advance:
    """Scale the units of `n_passes` passes over the same work to those of one."""
    done, reported = 0, 0

    def advance_share(n: int) -> None:
        nonlocal done, reported
        done += n
        advance(done // n_passes - reported)
        reported = done // n_passes

    return advance_share
