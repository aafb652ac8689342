"""Markdown from untrusted strings: names, licences, texts from repos.

The results can be put into a paragraph or a table cell. They show exactly the given characters:
nothing in them becomes markup, HTML, mathematics or a mention.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from urllib.parse import quote, urlsplit

from lewis_hub import display

LITERAL = re.compile(r"[A-Za-z0-9 ,./:;%()'-]")  # has no meaning in Markdown inside a line
PLAIN_CODE = re.compile(r"[ -~]*")  # without characters that tables, HTML or mathematics use:
NOT_IN_CODE = frozenset("`|<>&\\$")
INTRAWORD = re.compile(r"(?<=[A-Za-z0-9])&#95;(?=[A-Za-z0-9])")  # no emphasis inside a word
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, overrides of direction, ...
JOINERS = "\u200c\u200d"  # invisible too, but they shape Persian, Hindi and emoji


def text(value: object) -> str:
    """Show a string as it is, on one line."""
    escaped = "".join(
        char if LITERAL.fullmatch(char) or ord(char) > 127 else f"&#{ord(char)};"
        for char in visible(value)
    )
    escaped = re.sub(r"^(\d*)([-.)])", lambda m: f"{m[1]}&#{ord(m[2])};", escaped)  # no list item
    escaped = INTRAWORD.sub("_", escaped)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")  # no automatic link


def code(value: object) -> str:
    """Show a name as code, or as text if a code span cannot contain it."""
    shown = visible(value)
    if shown and PLAIN_CODE.fullmatch(shown) and not NOT_IN_CODE & set(shown):
        return f"`{shown}`"
    return text(shown)


def link(label: str, url: str | None) -> str:
    """Link a label, which is safe Markdown, to a web address; without an address only the label."""
    address = web_address(url)
    return f"[{label}](<{address}>)" if address else label


def web_address(url: str | None) -> str | None:
    """A web address with unusual characters percent-encoded; None if it is not a web address."""
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
    """A string on one line, without invisible characters."""
    line = " ".join(str(value).split())
    return "".join(char for char in line if unicodedata.category(char) not in INVISIBLE)


def visible_lines(value: object) -> str:
    """A text of several lines without invisible characters."""
    lines = str(value).expandtabs(4).splitlines()
    return "\n".join(
        "".join(c for c in line if c in JOINERS or unicodedata.category(c) not in INVISIBLE)
        for line in lines
    )


def as_html(sentence: str) -> str:
    """A sentence of literal text and code spans, as this module writes them, in HTML."""
    parts = re.split(r"`([^`]*)`", sentence)
    texts = (html.escape(html.unescape(part)) for part in parts[::2])
    codes = (f"<code>{html.escape(part)}</code>" for part in parts[1::2])
    return "".join(part for pair in zip_longest(texts, codes, fillvalue="") for part in pair)


def attribute(value: object) -> str:
    """A string for a double-quoted HTML attribute."""
    return html.escape(visible(value), quote=True)


def fenced(content: str, language: str) -> str:
    """A code block without controls of a terminal; its fence is longer than any in the content."""
    longest = max(map(len, re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = map(display.visible, content.rstrip("\n").splitlines())  # any break: a newline
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table of cells, which are safe Markdown; columns in `right` are aligned to the right."""
    aligned = set(right)
    rule = ["---:" if column in aligned else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
