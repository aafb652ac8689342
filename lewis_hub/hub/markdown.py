"""Renders a card as HTML on the embedded Hub: Markdown, tables, and pictures in two versions.

Raw HTML is not let through, it shows as text. The one exception is a picture with a version for
dark pages, as cards on the Hub write it::

    <picture><source media="(prefers-color-scheme: dark)" srcset="dark.png"><img src="light.png">
    </picture>

It is read by a pattern and written anew, attribute by attribute. A comment is left out, as any
reader of HTML would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import unescape
from typing import Any
from urllib.parse import quote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

DARK = "(prefers-color-scheme: dark)"
PICTURE = re.compile(r"<picture>\s*<source\s+([^<>]*)>\s*<img\s+([^<>]*)>\s*</picture>")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
ATTRIBUTE = re.compile(r'([a-z]+)="([^"]*)"')
WITH_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|/", re.IGNORECASE)

Place = Callable[[str], str]


def render(text: str, image: Place, link: Place) -> str:
    """HTML of a card's Markdown.

    Args:
        text: without the metadata.
        image: gives the address of a picture from its path in the repository.
        link: gives the page of a file from its path in the repository.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.inline.ruler.before("autolink", "picture", _read_picture)
    markdown.inline.ruler.before("autolink", "comment", _skip_comment)
    markdown.add_render_rule("picture", _write_picture)
    tokens = markdown.parse(text)
    for token in [*tokens, *(child for block in tokens for child in block.children or ())]:
        _place(token, "src", image)
        _place(token, "srcset", image)
        _place(token, "href", link)
        if alignment := token.attrs.pop("style", None):  # a page without inline styles
            token.attrs["class"] = str(alignment).removeprefix("text-align:")
    rendered: str = markdown.renderer.render(tokens, markdown.options, {})
    return rendered


def _place(token: Token, attribute: str, place: Place) -> None:
    """Turn a path in the repository into an address; leave addresses and anchors alone."""
    path = token.attrs.get(attribute)
    if isinstance(path, str) and path and not WITH_SCHEME.match(path) and path[0] not in "#?":
        parts = urlsplit(path)
        token.attrs[attribute] = place(parts.path.removeprefix("./")) + (
            f"#{quote(parts.fragment)}" if parts.fragment else ""
        )


def _read_picture(state: StateInline, silent: bool) -> bool:  # noqa: FBT001 - markdown-it calls it
    found = PICTURE.match(state.src, state.pos)
    if found is None:
        return False
    source, img = (
        {name: unescape(value) for name, value in ATTRIBUTE.findall(text)}
        for text in found.groups()
    )
    dark, light = source.get("srcset", ""), img.get("src", "")
    if source.get("media") != DARK or not (_is_safe(dark) and _is_safe(light)):
        return False
    if not silent:
        token = state.push("picture", "", 0)
        token.attrs = {"srcset": dark, "src": light}
        token.attrs |= {name: img.get(name, "") for name in ("alt", "width")}
    state.pos = found.end()
    return True


def _skip_comment(state: StateInline, silent: bool) -> bool:  # noqa: ARG001, FBT001 - their signature
    found = COMMENT.match(state.src, state.pos)
    if found is None:
        return False
    state.pos = found.end()
    return True


def _is_safe(address: str) -> bool:
    """Whether an address is a path, or on the web."""
    scheme = re.match(r"\s*([^/?#]*):", address)
    return bool(address) and (scheme is None or scheme.group(1).lower() in ("http", "https"))


def _write_picture(
    _renderer: Any, tokens: Sequence[Token], index: int, _options: Any, _env: Any
) -> str:
    value = {name: escapeHtml(str(text)) for name, text in tokens[index].attrs.items()}
    width = f' width="{value["width"]}"' if value["width"].isdecimal() else ""
    return (
        f'<picture><source media="{DARK}" srcset="{value["srcset"]}">'
        f'<img src="{value["src"]}" alt="{value["alt"]}"{width}></picture>'
    )
