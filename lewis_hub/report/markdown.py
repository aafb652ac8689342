"""Markdown from strings that anyone may have written: names, licences, texts from repos.

What these functions return can stand in a paragraph or in a table's cell, and shows exactly the
characters that were given: nothing in them becomes markup, HTML, mathematics or a mention.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from urllib.parse import quote, urlsplit

LITERAL = re.compile(r"[A-Za-z0-9 ,./:;%()'-]")  # shows as itself wherever we put it
PLAIN_CODE = re.compile(r"[ -~]*")  # but for what a table, HTML or mathematics might take up:
NOT_IN_CODE = frozenset("`|<>&\\$")
INTRAWORD = re.compile(r"(?<=[A-Za-z0-9])&#95;(?=[A-Za-z0-9])")  # an underscore that marks nothing
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, overrides of direction, ...


def text(value: object) -> str:
    """Show a string as it is, on one line."""
    told = "".join(
        char if LITERAL.fullmatch(char) or ord(char) > 127 else f"&#{ord(char)};"
        for char in visible(value)
    )
    told = re.sub(r"^(\d*)([-.)])", lambda m: f"{m[1]}&#{ord(m[2])};", told)  # opens no list
    told = INTRAWORD.sub("_", told)
    return told.replace("://", "&#58;//").replace("www.", "www&#46;")  # nor links itself


def code(value: object) -> str:
    """Show a name as code; one that no code span can hold, as text."""
    shown = visible(value)
    if shown and PLAIN_CODE.fullmatch(shown) and not NOT_IN_CODE & set(shown):
        return f"`{shown}`"
    return text(shown)


def link(label: str, url: str | None) -> str:
    """Link Markdown that is safe already to a web address; without one the label stays alone."""
    address = web_address(url)
    return f"[{label}](<{address}>)" if address else label


def web_address(url: str | None) -> str | None:
    """A web address with everything unusual percent-encoded; None if it is none."""
    if not url:
        return None
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return None
    return quote(url.strip(), safe=":/?#@!&=+,;~%.-_[]")


def visible(value: object) -> str:
    """On one line, without what cannot be seen and may change what is."""
    told = " ".join(str(value).split())
    return "".join(char for char in told if unicodedata.category(char) not in INVISIBLE)


def attribute(value: object) -> str:
    """A string for a double-quoted HTML attribute."""
    return html.escape(visible(value), quote=True)


def fenced(content: str, language: str) -> str:
    """A code block that its content cannot close."""
    longest = max(map(len, re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = content.rstrip("\n").splitlines()  # no lone carriage return, no exotic line break
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table of cells that are safe Markdown already; columns in `right` align right."""
    aligned = set(right)
    rule = ["---:" if column in aligned else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
