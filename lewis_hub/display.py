"""What users see of the work: its progress, and results as tables, lines and sizes.

The caller of long work decides what is shown, and where.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from html import escape
from typing import Literal, Protocol

LONGEST_NAME = 200  # letters of a name in a message
SHOWN_NAMES = 8  # of a list of names in a message
Advance = Callable[[int], None]  # called with the units done since the last call
Unit = Literal["bytes", "tokens", "items"]


# controls of a terminal, invisible changes of the direction of text, and what UTF-8 cannot encode
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # all but \t and \n
)
COMMAND = re.compile(r"^([^\S\n]*:)(?=:)|##(?=\[)", re.MULTILINE)  # of a log of GitHub Actions
USER_INFO = re.compile(r"(?<=://)[^\s/?#]*@")
# of the addresses that storage signs: who knows one can read or write the file for a while
SIGNED = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:signature|credential|policy|token|sig)=)[^\s&'\"`<>)\\]+"
)


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


SILENT = Silent()


def shared(advance: Advance, n_passes: int) -> Advance:
    """Scale the units of `n_passes` passes over the same work to those of one."""
    done, reported = 0, 0

    def advance_share(n: int) -> None:
        nonlocal done, reported
        done += n
        advance(done // n_passes - reported)
        reported = done // n_passes

    return advance_share


@dataclass(frozen=True)
class TextTable:
    """A table of texts; each row has as many cells as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_html(self) -> str:
        """Write the table as HTML; all texts are escaped."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def to_html(*parts: TextTable | str) -> str:
    """Write tables and lines as HTML for a notebook's `_repr_html_`; all texts are escaped."""
    return "".join(
        part.to_html() if isinstance(part, TextTable) else f"<div>{escape(part)}</div>"
        for part in parts
    )


def size(n_bytes: float) -> str:
    """Format bytes in powers of 1000, as disks and the Hub do."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def without_credentials(text: str) -> str:
    """The text with addresses that have no user, no password and no signature."""
    return SIGNED.sub(r"\1...", USER_INFO.sub("", text))


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """The beginning of a text that may come from others, as long as a message needs it."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def some_of(names: Sequence[str]) -> str:
    """The first of some names that may come from others, and how many more there are."""
    shown = ", ".join(shortened(name) for name in names[:SHOWN_NAMES])
    n_left = len(names) - SHOWN_NAMES
    return f"{shown} and {n_left:,} more" if n_left > 0 else shown


def visible(text: str) -> str:
    """The text with control characters as ASCII escapes; tabs and lines stay."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def line_of(text: str, n_characters: int) -> str:
    """A text of others as one line, which ends in `...` if it is longer."""
    return shortened(" ".join(visible(text).split()), n_characters)


def printable(text: str) -> str:
    """A text whose parts may come from others, so that it controls no terminal and no log."""
    return without_commands(visible(without_credentials(text)))


def without_commands(text: str) -> str:
    """The text without lines that GitHub Actions would take for its workflow commands."""
    return COMMAND.sub(lambda match: f"{match[0]} ", text)
