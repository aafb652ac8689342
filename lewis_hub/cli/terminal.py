"""Output of the commands: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from lewis_hub.display import (
    CONTROL,
    Progress,
    TextTable,
    printable,
    visible,
    without_commands,
    without_credentials,
)
from lewis_hub.errors import LewisHubError
from lewis_hub.progress import shown

if TYPE_CHECKING:
    from rich.table import Table

    from lewis_hub.evaluate.scores import Scores


P = ParamSpec("P")
COLUMN_GAP = 2  # spaces after a column
ERRORS = logging.Formatter()
NUMBER = re.compile(r"[-+]?\d|[-?]?$")  # the start of a number, or a sign that there is none


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text whose parts may come from others: it controls no terminal and no log."""
    click.echo(printable(text), err=err, nl=nl)


def say_json(document: Mapping[str, Any]) -> None:
    """Print a JSON document; its values stay the same but for credentials in addresses."""
    text = without_credentials(json.dumps(document, indent=2, ensure_ascii=False))
    text = CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)
    click.echo(text.replace("##[", "##\\u005b"))


def escape_logs() -> None:
    """Let what libraries log, such as values of a configuration, control no terminal either."""
    make = logging.getLogRecordFactory()

    def printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # a wrong format: logging itself reports it, escaped
            record.msg, record.args = printable(record.getMessage()), ()
            if record.exc_info:  # as logging.Formatter makes it, once
                record.exc_text = printable(ERRORS.formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(printable_record)


@dataclass(frozen=True)
class Terminal:
    """How this run prints: the result as JSON or not, progress or none."""

    json: bool
    quiet: bool

    @property
    def progress(self) -> Progress:
        """Progress bars on a terminal, occasional lines in a log, nothing with --quiet."""
        return shown(not self.quiet)

    @property
    def width(self) -> int:
        """Characters per line of a result; 120 in a file or log."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else 120

    def finish(self, document: Mapping[str, Any], *shown: TextTable | str) -> None:
        """Print the result: `document` with --json, otherwise `shown`."""
        if self.json:
            say_json(document)
            return
        for item in shown:
            if isinstance(item, str):
                say(item)
                continue
            from rich.console import Console

            # names from repos may look like markup or emoji codes
            console = Console(width=self.width, highlight=False, markup=False, emoji=False)
            with console.capture() as captured:
                console.print(to_rich(item))
            click.echo(without_commands(captured.get()), nl=False)

    def refuse(self, refusal: LewisHubError) -> NoReturn:
        """Exit after a result that the quality gate refuses."""
        say(f"lewis-hub: {refusal}", err=True)
        raise click.exceptions.Exit(refusal.exit_code)


def scores_table(scores: Scores) -> TextTable:
    """Name the models of a table of scores for readers."""
    from lewis_hub.report.findings import model_name

    return replace(scores.table, header=("task", "metric", "n", *map(model_name, scores.labels)))


def to_rich(texts: TextTable) -> Table:
    """Convert a table; columns of numbers are aligned on the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for head, *cells in zip(texts.header, *texts.rows, strict=True):
        table.add_column(
            visible(head),
            justify="right" if all(map(NUMBER.match, cells)) else "left",
            overflow="fold",
            no_wrap=head in {"name", "paper"},
        )
    for row in texts.rows:
        table.add_row(*(visible(without_credentials(cell)) for cell in row))
    return table


def terminal_options(command: Callable[P, None]) -> Callable[..., None]:
    """Add --json and -q to a command, and pass it a `Terminal` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @functools.wraps(command)
    def with_terminal(*args: Any, as_json: bool, quiet: bool, **options: Any) -> None:
        command(Terminal(as_json, quiet), *args, **options)  # type: ignore[arg-type]

    return with_terminal
