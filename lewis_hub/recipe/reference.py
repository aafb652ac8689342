"""How a recipe names a model, and what all parts of a recipe have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from lewis_hub.files import starts_like_path

REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
TAG = re.compile(  # by git's rules for the names of references
    r"(?!@$|-|refs/|[./])(?!.*(?:\.\.|@\{|//|/\.|\.lock(?:/|$)))[^\x00-\x20\x7f~^:?*\[\\]+(?<![./])"
)


class Part(BaseModel):
    """A part of a recipe: immutable, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def listed(value: Any) -> Any:
    """A single mapping stands for a list of one."""
    return [value] if isinstance(value, Mapping) else value


def present(value: Any) -> Any:
    """A key without a value stands for an empty mapping."""
    return {} if value is None else value


def allow_name(schema: dict[str, Any]) -> None:
    """Let editors accept a name instead of a mapping."""
    mapping = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, mapping]


class ModelReference(Part):
    """A model as the user wrote it: `owner/name`, `owner/name@revision` or a local folder.

    `BASE+ADAPTER` is an adapter on a base. On another base than the recipe's `base_model` it is
    merged into that base first.
    """

    model_config = ConfigDict(json_schema_extra=allow_name)

    name: str = Field(min_length=1)
    revision: str | None = None
    on: ModelReference | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "model" in value:  # mergekit's long form
            if odd := value.keys() - {"model", "revision", "lora"}:
                raise ValueError(f"`{min(odd)}` is not a key of a model")
            whole = _long_form(value["model"], value.get("revision"))
            lora = value.get("lora")
            return {**_long_form(lora, None), "on": whole} if lora else whole
        value = str(value) if isinstance(value, Path) else value
        if not isinstance(value, str):
            return value
        base, plus, adapter = value.partition("+")
        if plus and not _is_path_with_plus(value, adapter):
            if "+" in adapter:
                raise ValueError("a base takes one adapter: list each adapter as an expert")
            return {**_name_and_revision(adapter), "on": base}
        return _name_and_revision(value)

    @model_serializer
    def _as_written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        own = f"{self.name}@{self.revision}" if self.revision else self.name
        return f"{self.on}+{own}" if self.on else own


def _long_form(value: Any, revision: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and "path" in value:
        return {"name": value["path"], "revision": value.get("revision", revision)}
    if isinstance(value, str) and revision is None:
        return _name_and_revision(value)
    return {"name": value, "revision": revision}


def _name_and_revision(value: str) -> dict[str, Any]:
    if _is_path(value):
        return {"name": value}
    name, _, revision = value.partition("@")
    return {"name": name, "revision": revision or None}


def _is_path_with_plus(value: str, after: str) -> bool:
    """Whether `value` is a folder with a plus in its name, and not an adapter on a base."""
    if _exists(value):
        return True
    return _is_path(value) and not (_is_path(after) or REPO.fullmatch(after.partition("@")[0]))


def _is_path(name: str) -> bool:
    return starts_like_path(name) or _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or no text of a file system
        return False
