"""The JSON documents of this room: versioned, checked field by field on reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from lewis_hub.errors import ProfileError

VERSION = 1


def write(document: Mapping[str, Any]) -> str:
    """Write a document in the order it was given."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read(text: str, file: str) -> dict[str, Any]:
    """Parse a document and check its version.

    Raises:
        ProfileError: not JSON, no version, or another one.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise broken(file, f"not JSON: {error}") from error
    version = take(document, "version", int, file)
    if version != VERSION:
        problem = f"it has version {version}, this program reads version {VERSION}"
        raise ProfileError(file, problem, "Upgrade lewis-hub, or delete the file to measure again.")
    return cast("dict[str, Any]", document)


def take(document: Any, key: str, kind: type, file: str) -> Any:
    """Take a field, of a kind that is checked."""
    value = _value(document, key, file)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise broken(file, f"`{key}` is a {type(value).__name__}, not a {kind.__name__}")
    return value


def take_number(document: Any, key: str, file: str) -> float:
    """Take a field that holds a finite number."""
    value = _value(document, key, file)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise broken(file, f"`{key}` is {value!r}, not a number")
    return float(value)


def _value(document: Any, key: str, file: str) -> Any:
    if not isinstance(document, dict):
        raise broken(file, f"a {type(document).__name__} stands where an object belongs")
    if key not in document:
        raise broken(file, f"`{key}` is missing")
    return document[key]


def take_numbers(document: Any, key: str, file: str) -> dict[str, float]:
    """Take a field that maps names to finite numbers."""
    named = take(document, key, dict, file)
    return {name: take_number(named, name, file) for name in named}


def broken(file: str, problem: str) -> ProfileError:
    """The error for a file that this program did not write, or not as it is now."""
    return ProfileError(file, problem, "Delete the file to have it made again.")
