"""The web page of a repository on the embedded Hub: its rendered card, files and newest commits.

The card's Markdown is rendered without raw HTML, which shows as text, and without its comments.
The only exception is a picture with a version for dark pages, as cards on the Hub write it::

    <picture><source media="(prefers-color-scheme: dark)" srcset="dark.png"><img src="light.png">
    </picture>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import unescape
from importlib import resources
from itertools import islice
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from lewis_hub.localhub.call import Call
from lewis_hub.localhub.repositories import FRONT_MATTER

DARK = "(prefers-color-scheme: dark)"
# possessive: the time of a pattern that tries again grows with the square of a text
PICTURE = re.compile(r"<picture>\s*+<source\s++([^<>]*+)>\s*+<img\s++([^<>]*+)>\s*+</picture>")
ATTRIBUTE = re.compile(r'(?<![a-z])([a-z]++)="([^"]*+)"')
MAX_BRACKETS = 20_000  # of a card: so does the time that markdown-it takes for open ones
MAX_LINES = 20_000  # of a card: markdown-it reads each line again for each block around it
WITH_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|/", re.IGNORECASE)
N_COMMITS = 20
HUGGING_FACE = "https://huggingface.co"


def repository(call: Call) -> Response:
    """A repository at a revision or pull request; the page loads no scripts and no other site."""
    repo = call.read_repo()
    number = call.parts.get("number")
    commit = call.commit(repo, f"refs/pr/{number}" if number else None)
    files = f"{repo.page}/resolve/{commit.sha}"
    card = FRONT_MATTER.sub("", call.store.read_text(commit, "README.md"), count=1)
    rendered = render_markdown(card, lambda path: f"{files}/{quote(path, safe='/%')}")
    shown = {
        "repo": repo,
        "commit": commit,
        "card": Markup(rendered),  # noqa: S704 - made by render_markdown, which escapes
        "files": [(path, f"{files}/{quote(path)}") for path in sorted(commit.files)],
        "commits": list(islice(repo.history(commit), N_COMMITS)),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_template("page.html")).render(**shown)
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; img-src 'self' data: {call.hub.storage_url}",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


def style(_call: Call) -> Response:
    """The style sheet of the page."""
    return Response(_template("style.css"), media_type="text/css")


def _template(name: str) -> str:
    return resources.files("lewis_hub.templates").joinpath("hub", name).read_text("utf-8")


def render_markdown(text: str, address: Callable[[str], str]) -> str:
    """HTML of a card's Markdown; `address` turns the path of a file into its address.

    A card with far more brackets or lines than cards have is shown as plain text.
    """
    n_lines = text.count("\n") + text.count("\r") - text.count("\r\n")
    if text.count("[") > MAX_BRACKETS or n_lines > MAX_LINES:
        return f"<pre>{escapeHtml(text)}</pre>"
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.inline.ruler.before("autolink", "picture", _read_picture)
    markdown.inline.ruler.before("autolink", "comment", _skip_comment)
    markdown.add_render_rule("picture", _write_picture)
    tokens = markdown.parse(text)
    for token in [*tokens, *(child for block in tokens for child in block.children or ())]:
        for attribute in ("src", "srcset", "href"):
            path = token.attrs.get(attribute)
            if isinstance(path, str) and path:
                token.attrs[attribute] = _placed(path, address)
        if alignment := token.attrs.pop("style", None):  # the page allows no inline styles
            token.attrs["class"] = str(alignment).removeprefix("text-align:")
    rendered: str = markdown.renderer.render(tokens, markdown.options, {})
    return rendered


def _placed(path: str, address: Callable[[str], str]) -> str:
    """The address of a path in the repository; addresses and anchors stay as they are.

    This server stands for huggingface.co, so an address there is one on this server.
    """
    path = path.removeprefix(HUGGING_FACE) if path.startswith(f"{HUGGING_FACE}/") else path
    if WITH_SCHEME.match(path) or path[0] in "#?":
        return path
    try:
        parts = urlsplit(path)
    except ValueError:  # such as `//[`
        return path
    fragment = f"#{quote(parts.fragment)}" if parts.fragment else ""
    return address(parts.path.removeprefix("./")) + fragment


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
    text, begin = state.src, state.pos
    if not text.startswith("<!--", begin):
        return False
    known, last = state.env.get("last end of a comment", (None, -1))
    if known is not text:  # it is looked for once
        last = text.rfind("-->")
        state.env["last end of a comment"] = text, last
    if last < begin + len("<!--"):
        return False
    state.pos = text.index("-->", begin + len("<!--")) + len("-->")
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
