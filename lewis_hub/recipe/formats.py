"""The formats that a merge is exported to beside its safetensors, and the names of their files."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

ExportFormat = Literal["gguf:f16", "gguf:bf16", "gguf:q8_0"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
ALIASES: dict[str, ExportFormat] = {"gguf": "gguf:f16"}


def _listed(value: Any) -> Any:
    """Return a list in the order of `FORMATS`, each format once; `value` may be a single one."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    named = [ALIASES.get(one, one) if isinstance(one, str) else one for one in value]
    unknown = [one for one in named if one not in FORMATS]
    return [*(one for one in FORMATS if one in named), *unknown]


Exports = Annotated[
    tuple[ExportFormat, ...],
    Field(min_length=1),
    BeforeValidator(
        _listed,
        json_schema_input_type=ExportFormat
        | Literal["gguf"]
        | tuple[ExportFormat | Literal["gguf"], ...],
    ),
]


def file_type(export: ExportFormat) -> str:
    """Return ggml's name of the type of the matrices."""
    return export.partition(":")[2].upper()


def file_name(export: ExportFormat) -> str:
    """Return the name of the file; llama.cpp finds a type by the end of the name."""
    return f"model-{file_type(export)}.gguf"


def exports_in(recipe: Any) -> tuple[ExportFormat, ...]:
    """Return the formats in the plain recipe of a lock."""
    asked = recipe.get("export")
    return tuple(one for one in FORMATS if isinstance(asked, list | tuple) and one in asked)
