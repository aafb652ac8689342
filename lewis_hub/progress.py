"""Progress on stderr: of the command line, and of Python functions by default."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from lewis_hub.display import (
    SILENT,
    Advance,
    Progress,
    Unit,
    printable,
    size,
    visible,
    without_credentials,
)

LOG_EVERY_S = 20.0
Shown = Progress | bool  # what an argument `progress` may be; see `shown`
BY_DEFAULT: Shown = True


def shown(progress: Shown) -> Progress:
    """Return the progress that an argument asks for.

    True: bars with the remaining time on a terminal, lines in a notebook or log. False: nothing.
    """
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return SILENT
    return Bars() if sys.stderr.isatty() else Lines()


class Bars:
    """A progress bar with the remaining time for each stage."""

    @contextmanager
    def stage(self, title: str, total: int, unit: Unit) -> Iterator[Advance]:
        """Show a bar until the stage ends."""
        from rich import progress as rich_progress
        from rich.console import Console

        count: rich_progress.ProgressColumn = (
            rich_progress.DownloadColumn()
            if unit == "bytes"
            else rich_progress.TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}")
        )
        columns = (
            rich_progress.TextColumn("{task.description:<28}", markup=False),
            rich_progress.BarColumn(bar_width=30),
            count,
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
            bar = bars.add_task(visible(without_credentials(title)), total=total)
            yield lambda done: bars.advance(bar, done)

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(printable(text), err=True)


class Lines:
    """For logs: a line at the start and end of a stage, and every `LOG_EVERY_S` between them."""

    @contextmanager
    def stage(self, title: str, total: int, unit: Unit) -> Iterator[Advance]:
        """Print lines until the stage ends."""
        started = logged = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, logged
            done += n
            now = time.monotonic()
            if now - logged >= LOG_EVERY_S and 0 < done < total:
                logged = now
                left = (now - started) / done * (total - done)
                self.say(
                    f"{title}: {done / total:.0%} of {_amount(total, unit)}, {left:.0f} s left"
                )

        self.say(f"{title}: {_amount(total, unit)}")
        yield advance
        self.say(f"{title}: done in {time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(printable(text), err=True)


def _amount(total: int, unit: Unit) -> str:
    return size(total) if unit == "bytes" else f"{total:,} {unit}"
