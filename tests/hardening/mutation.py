"""Documents that are almost valid: values of a valid one are replaced, moved, doubled or removed.

A document is plain JSON; its top level maps the names of files to their contents. A content that is
a text is written as it stands, so damage of bytes is a change of such a text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

Document = dict[str, Any]

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 64, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64),
    *(-(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "\n", "a\nb", "\x1b[31m", "::error::x", "\ud800", "é", "𝕏", "\u202e"),
    *("x" * 1000, "../../etc/passwd", "/etc/passwd", "C:\\x", "%s", "{0}", "{{ x }}", "a" * 70_000),
    *(
        "0",
        "1",
        "-1",
        "1e9",
        "nan",
        "true",
        "null",
        "[]",
        "(a+)+b",
        "*",
        "**",
        "(",
        "[",
        "\\",
        "^$",
    ),
    *([], {}, [[]], [{}], {"": ""}, {"a": {}}, [None], [0] * 70, [1, 2], [0, 1], ["a", "b"]),
    *([2**62, 4], [0, 2**63], {"shape": [2**40]}, [[1, 2], [3, 4]], ["a", 1], {"1": 1}),
)
ALPHABET = [chr(i) for i in (*range(128), 0xE9, 0x2028, 0xFEFF, 0x1F600)]
SNIPPETS = (
    *('"', "{", "}", "[", "]", ",", ":", "\\", "\\u0000", "\\ud800", "NaN", "-", "1e999", "/*"),
    *("!!int ", "!!bool ", "!!timestamp "),
    *("&a ", "*a", "<<: ", "!!python/object:os.system ", "!!binary ", "? ", "---\n", "\t", "%YAML"),
    *('"' * 50, "[" * 200, '{"a":' * 150, "9" * 5000, "- " * 200, "\r", "|\n", ">-\n", "\x85"),
)


def mutated(document: Document, random: Random) -> Document:
    """A copy of a document with one change or some."""
    changed = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        if random.random() < 0.15:
            damage(changed, random)
        else:
            replace(changed, random)
    return changed


def damage(document: Document, random: Random) -> None:
    """Change some letters in the text of one file."""
    name = random.choice(sorted(document))
    content = document[name]
    if content is None:
        return
    text = content if isinstance(content, str) else json.dumps(content)
    place, length = random.randint(0, len(text)), random.choice((0, 0, 1, 1, 2, 8, len(text)))
    inserted = random.choice((*SNIPPETS, "", "", "", random.choice(ALPHABET)))
    document[name] = text[:place] + inserted + text[place + length :]


def replace(document: Document, random: Random) -> None:
    """Replace, move, double, rename or remove a value somewhere below the files' names."""
    places = list(_places(document))
    around, key = random.choice(places)
    kind = random.randrange(8)
    if kind < 4:
        around[key] = copy.deepcopy(random.choice(HOSTILE))
    elif kind == 4:
        other, its_key = random.choice(places)
        around[key] = copy.deepcopy(other[its_key])
    elif kind == 5 and around is not document:
        del around[key]
    elif kind == 6:
        around[key] = _nudged(around[key], random)
    elif isinstance(around, dict) and around is not document:
        new = random.choice(HOSTILE)
        around[new if isinstance(new, str) else f"{key}{new}"[:100]] = around.pop(key)
    elif isinstance(around, list):
        around.insert(key, copy.deepcopy(around[key]))


def _nudged(value: Any, random: Random) -> Any:
    """A value near by, or the same in other words."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, 2 * value, value << 33, str(value)))
    if isinstance(value, float):
        return random.choice((-value, value * 1e300, value / 3, value // 1, str(value)))
    if isinstance(value, str):
        return random.choice((value[1:], value + value, value.upper(), [value], value + "\0"))
    if isinstance(value, list):
        return random.choice((value[1:], value + value, value[::-1], {"a": value}, value * 5))
    if isinstance(value, dict):
        return random.choice(([value], list(value), list(value.items()), {**value, "x": value}))
    return {}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value: the dict or list around it, and its key or index."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
