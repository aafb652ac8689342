"""YAML and JSON that others wrote, read within limits of size, depth and number of values.

A YAML alias counts as the value that it repeats, so a few hundred bytes cannot become gigabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml

MAX_DEPTH = 100  # of lists and mappings in each other
MAX_VALUES = 200_000  # of a YAML document; a long text counts as several
TEXT_PER_VALUE = 100  # characters
MAX_NUMBER = 1000  # characters: PyYAML's time for `1:1:1...` grows with their square
LONG_NUMBER = 18  # characters: longer ones can be keys with the same hash
VALUES_PER_LONG_NUMBER = 200
MAX_YAML_BYTES = 2 << 20
MAX_JSON_BYTES = 16 << 20
MAX_TABLE_BYTES = 100_000_000  # of a vocabulary, a header, an index of shards, or all scored items
MAX_JSON_VALUES = 4_000_000  # a header of some 300,000 tensors, a vocabulary of a million tokens
NUMBER = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_:.]*)")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a letter, which UTF-8 cannot encode
TAGS = re.compile("(?:^\ufeff?|[\r\n\x85\u2028\u2029])%TAG")  # a directive that shortens tags

QuickLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DocumentError(ValueError):
    """A document is not valid, or beyond a limit; callers add where it is and what to do."""

    def __init__(self, problem: str, line: int | None = None, details: str = "") -> None:
        super().__init__(problem, line, details)
        self.problem, self.line, self.details = problem, line, details

    def __str__(self) -> str:
        return self.details or self.problem


def read_json(
    text: str | bytes, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_JSON_VALUES
) -> Any:
    """Read a JSON document.

    Raises:
        ValueError: it is not JSON, or it is too large or too deep.
    """
    _require_size(text, max_bytes)
    require_few_values(text, max_values)
    try:
        document = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    level = [document]
    for _ in range(MAX_DEPTH):
        level = _collections_in(level)
        if not level:
            return document
    raise _too_deep()


def count_values(text: str | bytes) -> int:
    """At least the number of values in a JSON text, and quick: each takes much more memory."""
    if isinstance(text, str):
        return sum(map(text.count, ",:[{"))
    return sum(map(text.count, (b",", b":", b"[", b"{")))


def require_few_values(text: str | bytes, max_values: int) -> None:
    """Refuse a JSON text with more values, before it is parsed.

    Raises:
        DocumentError: it has more.
    """
    if (n_values := count_values(text)) > max_values:
        raise DocumentError(f"it has {n_values:,} values, the limit is {max_values:,}")


def require_few_keys(document: Any, max_keys: int) -> None:
    """Refuse a parsed JSON document whose objects have more keys, all together.

    pydantic takes some kB to tell what is wrong with the value of each. It stops at the first wrong
    item of a list that has `fail_fast`, but has no such option for objects.

    Raises:
        DocumentError: they have more.
    """
    n_keys, level = 0, [document]
    while level:
        n_keys += sum(len(value) for value in level if isinstance(value, dict))
        if n_keys > max_keys:
            raise DocumentError(f"it has more than {max_keys:,} keys")
        level = _collections_in(level)


def leaves(value: Any) -> Iterator[Any]:
    """All values of nested mappings, lists and tuples that are none of these, in their order."""
    left = [value]
    while left:
        part = left.pop()
        # most are plain, and whether one is a Mapping takes long to tell
        if isinstance(part, str | int | float) or not isinstance(part, list | tuple | Mapping):
            yield part
        else:
            left += reversed([*(part.values() if isinstance(part, Mapping) else part)])


def texts_in(value: Any) -> Iterator[str]:
    """All texts in nested mappings, lists and tuples, without keys, in their order."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, str))


def read_yaml(text: str | bytes, loader: type[yaml.SafeLoader] = QuickLoader) -> Any:
    """Read a YAML document with a safe loader.

    Raises:
        DocumentError: it is not valid YAML, or beyond a limit.
    """
    with _opened(text, loader, MAX_YAML_BYTES) as reader:
        return reader.get_single_data()


def read_yaml_documents(
    text: str | bytes, loader: type[yaml.SafeLoader], max_bytes: int = MAX_YAML_BYTES
) -> list[tuple[yaml.Node | None, Any]]:
    """Read all documents of a YAML text: their nodes, which know their lines, and their values.

    The limits are those of one document, for all of them together.

    Raises:
        DocumentError: it is not valid YAML, or beyond a limit.
    """
    found: list[tuple[yaml.Node | None, Any]] = []
    with _opened(text, loader, max_bytes) as reader:
        while reader.check_node():
            if (node := reader.get_node()) is not None:
                found.append((node, reader.construct_document(node)))
    return found


@contextmanager
def _opened(
    text: str | bytes, loader: type[yaml.SafeLoader], max_bytes: int
) -> Iterator[yaml.SafeLoader]:
    """Open a text within the limits; PyYAML's errors are raised as DocumentErrors."""
    _require_size(text, max_bytes)
    try:
        text = text.decode() if isinstance(text, bytes) else text
        _require_limits(text, loader)
        reader = loader(text)
        try:
            yield reader
        finally:
            reader.dispose()
    except DocumentError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise DocumentError(problem, mark.line + 1 if mark else None, str(error)) from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's constructors: a date such as 0-0, `!!int ""`, `!!bool x`, `!!timestamp x`
        is_clear = isinstance(error, ValueError)
        raise DocumentError(str(error) if is_clear else "a value is not of its type") from None


def front_matter(card: str) -> str:
    """The YAML between the `---` lines at the start of a card, or nothing.

    It is what huggingface_hub takes for it: `datasets` reads that, without limits.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.search(card)
    return found[2] if found else ""


def _require_size(text: str | bytes, max_bytes: int) -> None:
    if len(text) > max_bytes:
        size, limit = (f"{n / 1e6:.1f} MB" for n in (len(text), max_bytes))
        raise DocumentError(f"it has {size}, the limit is {limit}")


@dataclass
class _Value:
    """What is known of a value while its events pass."""

    anchor: str | None
    n_values: int = 1  # with those inside it, aliases written out
    height: int = 0  # of the lists and mappings in each other

    def add(self, inner: _Value) -> None:
        self.n_values += inner.n_values
        self.height = max(self.height, inner.height + 1)


def _require_limits(text: str, loader: type[yaml.SafeLoader]) -> None:
    """Refuse a document by its events, before PyYAML recurses into it."""
    if found := TAGS.search(text):  # libyaml compares each with all others; values repeat its text
        n_lines = text.count("\n", 0, found.end())
        raise DocumentError("it has a `%TAG` directive, which is not read", n_lines + 1)
    around = [_Value(None)]  # the collections that an event is in
    complete: dict[str | None, _Value] = {}
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.CollectionStartEvent):
            complete.pop(event.anchor, None)
            around.append(_Value(event.anchor))
            value = _Value(None, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            value = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in complete and event.anchor in {v.anchor for v in around}:
                raise DocumentError(f"the value of `&{event.anchor}` contains itself", line)
            value = replace(complete.get(event.anchor, _Value(None)), anchor=None)
        elif isinstance(event, yaml.ScalarEvent):
            value = _Value(event.anchor, _weight(event, line))
        else:
            continue
        if value.anchor:
            complete[value.anchor] = value
        around[-1].add(value)
        if len(around) - 1 + value.height > MAX_DEPTH:
            raise _too_deep(line)
        if around[-1].n_values > MAX_VALUES:
            problem = f"it has more than {MAX_VALUES:,} values once its aliases are written out"
            raise DocumentError(problem, line)


def _weight(event: yaml.ScalarEvent, line: int | None) -> int:
    """The number of values that a text or number counts as."""
    text = event.value
    if SURROGATE.search(text):
        raise DocumentError("a text has half a letter, which UTF-8 cannot encode", line)
    if (event.tag or event.implicit[0]) and len(text) > LONG_NUMBER and NUMBER.fullmatch(text):
        if len(text) > MAX_NUMBER:
            raise DocumentError(f"a number has more than {MAX_NUMBER:,} characters", line)
        return 1 if "." in text else VALUES_PER_LONG_NUMBER
    return 1 + len(text) // TEXT_PER_VALUE


def _too_deep(line: int | None = None) -> DocumentError:
    return DocumentError(f"its values are in each other more than {MAX_DEPTH} deep", line)


def _collections_in(values: Iterable[Any]) -> list[Any]:
    return [item for value in values for item in _items(value) if isinstance(item, dict | list)]


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
