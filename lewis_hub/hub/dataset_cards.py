"""Cards of datasets, which `datasets` reads without limits: what they may say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

from lewis_hub.documents import MAX_JSON_BYTES, DocumentError, front_matter, read_json, read_yaml
from lewis_hub.errors import SourceError
from lewis_hub.files import require_inside
from lewis_hub.hub.fetch import read_small

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import HfApi

    from lewis_hub.hub.source import Source

README = "README.md"
INFOS = "dataset_infos.json"
CARDS = (README, ".huggingface.yaml", INFOS)  # `datasets` reads all of them
ELSEWHERE = re.compile(r"://|::|^[/~\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")
# options of a card that are letters: pandas reads longer ones as patterns
LETTERS = ("sep", "delimiter", "thousands", "decimal", "comment", "quotechar", "escapechar")
SPACES = r"\s+"
# texts that are in tables, and name no data
CONTENTS = frozenset(
    {"description", "names", "column_names", "index_col", "usecols", "columns", "field"}
    | {"na_values", "true_values", "false_values"}
)
# `datasets` tries all places for each wildcard in a name, and for each `**`
MAX_STARS, MAX_DOUBLE_STARS = 3, 2


def require_own_files(api: HfApi, source: Source) -> None:
    """Refuse a dataset whose card names data elsewhere: `datasets` would ask any host for it.

    Raises:
        SourceError: the card, which `datasets` reads without limits, names an address or a path
            out of the repo, or is beyond the limits.
    """
    if source.folder and source.folder.is_file():
        return
    for name in CARDS:
        content = _local(source.folder, name) if source.folder else read_small(api, source, name)
        try:
            wrong = _wrong(name, content or b"")
        except ValueError as error:
            remedy = "Repair its card, or use another dataset."
            raise SourceError(source.pinned, f"`{name}` cannot be read: {error}", remedy) from None
        if wrong:
            problem, remedy = wrong
            raise SourceError(source.pinned, f"`{name}` {problem}", remedy)


@lru_cache(4)  # a card within the limits may take 8 s, and a recipe names a dataset several times
def _wrong(name: str, content: bytes) -> tuple[str, str] | None:
    """Problem and remedy of what `datasets` must not read in a card."""
    card = _card(name, content)
    return next(_wrongs(card.get("configs") if isinstance(card, dict) else None), None)


def _card(name: str, content: bytes) -> Any:
    """What a card says of files; it has to be within the limits of documents."""
    if len(content) > MAX_JSON_BYTES:
        raise DocumentError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    text = content.decode("utf-8", errors="replace")
    if name == INFOS:  # it names no files
        read_json(text or "{}")
        return {}
    if name == README:
        text = front_matter(text.removeprefix("\ufeff"))
    return read_yaml(text, yaml.SafeLoader)  # as `datasets`: libyaml reads some texts otherwise


def _wrongs(configs: Any) -> Iterator[tuple[str, str]]:
    """Problem and remedy of each part of a card that `datasets` must not read."""
    for key, text in _texts(configs):
        n_stars = max(part.count("*") for part in text.split("/"))
        if key in LETTERS:
            if len(text) > 2 and text != SPACES:
                problem = f"sets `{key}` to a pattern: {text[:100]}"
                yield problem, "Use a dataset whose tables are separated by one letter."
        elif ELSEWHERE.search(text):
            problem = f"names data that is not in it: {text[:100]}"
            yield problem, "Use a dataset that has its data itself."
        elif text.count("**") > MAX_DOUBLE_STARS or n_stars > MAX_STARS:
            problem = f"names its data by too many wildcards: {text[:100]}"
            yield problem, "Use a dataset that names its files."


def _local(folder: Path, name: str) -> bytes:
    file = folder / name
    if os.path.lexists(file):  # a link to nothing, too
        require_inside(folder, file, SourceError)
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        return opened.read(MAX_JSON_BYTES + 1)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in `configs` that may name data, each with the key that it has."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if key or name not in CONTENTS:
                yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
