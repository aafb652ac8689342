"""Reads a model or dataset card's metadata on the embedded Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from lewis_hub.hub.store import Commit, Store

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def card_text(store: Store, commit: Commit) -> str | None:
    """A commit's README.md; None if it has none."""
    file = commit.files.get("README.md")
    return store.blobs.read(file.sha256).decode(errors="replace") if file else None


def card_metadata(text: str | None) -> dict[str, Any]:
    """The metadata between a card's ``---`` lines, as JSON values; empty where there is none.

    Raises:
        yaml.YAMLError: the block is no YAML mapping.
    """
    found = FRONT_MATTER.match(text or "")
    document = yaml.safe_load(found.group(1)) if found else None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise yaml.YAMLError("the metadata must be a mapping")
    metadata: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return metadata


def card_body(text: str) -> str:
    """A card without its metadata."""
    return FRONT_MATTER.sub("", text, count=1)


def as_list(value: object) -> list[str]:
    """A metadata entry that may be one value or several, as texts."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(item) for item in values]


def tags(metadata: Mapping[str, Any], commit: Commit) -> list[str]:
    """The tags that the Hub derives from a card and the files beside it."""
    relation = metadata.get("base_model_relation")
    parents = as_list(metadata.get("base_model"))
    found = [
        *as_list(metadata.get("library_name")),
        *(["safetensors"] if any(p.endswith(".safetensors") for p in commit.files) else []),
        *as_list(metadata.get("tags")),
        *as_list(metadata.get("pipeline_tag")),
        *as_list(metadata.get("language")),
        *(f"base_model:{parent}" for parent in parents),
        *(f"base_model:{relation}:{parent}" for parent in parents if relation),
        *(f"license:{name}" for name in as_list(metadata.get("license"))),
        "region:us",
    ]
    return list(dict.fromkeys(found))
