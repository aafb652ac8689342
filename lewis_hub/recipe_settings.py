"""A recipe's settings: numbers, gradients and conditions, as mergekit writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

ApplyTo = Literal["density", "weight", "both"]  # what a guide's schedule sets

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", re.ASCII)


def _number(value: bool | int | float | str) -> bool | int | float | str:  # noqa: FBT001
    """YAML reads 1e-5, which has no point, as text."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Scalar = Annotated[bool | int | float | str, AfterValidator(_number)]
Gradient = Annotated[tuple[float, ...], Field(min_length=1)]


class Part(BaseModel):
    """A part of a recipe: it stays as it was read, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Conditional(Part):
    """A value for the tensors whose names contain `filter`; the first that matches counts."""

    filter: str | None = Field(None, description="Part of a tensor's name; absent or `*`: any.")
    value: Scalar | Gradient


def _listed(value: Any) -> Any:
    """Mergekit takes a single condition without a list."""
    return [value] if isinstance(value, Mapping) else value


Conditions = Annotated[
    tuple[Conditional, ...],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=Conditional | tuple[Conditional, ...]),
]
Setting = Scalar | Gradient | Conditions
Settings = Mapping[str, Setting]


def _present(value: Any) -> Any:
    return {} if value is None else value


Parameters = Annotated[Settings, BeforeValidator(_present)]  # a key without a value is allowed
