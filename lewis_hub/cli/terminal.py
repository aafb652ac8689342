"""Output of the commands: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import click

from lewis_hub.display import size
from lewis_hub.progress import Advance, Progress, Silent, Unit

if TYPE_CHECKING:
    from rich.console import RenderableType


P = ParamSpec("P")
LOG_EVERY_S = 20.0


@dataclass(frozen=True)
class Terminal:
    """How this run prints.

    Attributes:
        json: print the result as one JSON document.
        quiet: print no progress.
    """

    json: bool
    quiet: bool

    @property
    def progress(self) -> Progress:
        """Progress bars on a terminal, occasional lines in a log, nothing with --quiet."""
        if self.quiet:
            return Silent()
        return Bars() if sys.stderr.isatty() else Lines()

    @property
    def width(self) -> int:
        """Characters per line of a result; 120 in a file or log."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else 120

    def finish(self, document: Mapping[str, Any], *shown: RenderableType) -> None:
        """Print the result: `document` with --json, otherwise `shown`."""
        if self.json:
            click.echo(json.dumps(document, indent=2, ensure_ascii=False))
            return
        from rich.console import Console
        from rich.table import Table

        console = Console(file=sys.stdout, width=self.width, highlight=False, markup=False)
        for item in shown:  # rich must not wrap sentences: they contain paths and addresses
            console.print(item, soft_wrap=not isinstance(item, Table))


def terminal_options(command: Callable[P, None]) -> Callable[..., None]:
    """Add --json and -q to a command, and pass it a `Terminal` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @functools.wraps(command)
    def with_terminal(*args: Any, as_json: bool, quiet: bool, **options: Any) -> None:
        command(Terminal(as_json, quiet), *args, **options)  # type: ignore[arg-type]

    return with_terminal


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
            rich_progress.TextColumn("{task.description:<28}"),
            rich_progress.BarColumn(bar_width=30),
            count,
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda done: bars.advance(bar, done)

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(text, err=True)


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
        click.echo(text, err=True)


def _amount(total: int, unit: Unit) -> str:
    return size(total) if unit == "bytes" else f"{total:,} {unit}"
