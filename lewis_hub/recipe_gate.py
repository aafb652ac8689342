"""What a recipe says of the quality gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lewis_hub.recipe_settings import Part


class Gate(Part):
    """What a merge has to reach on one metric of one task to be published."""

    task: str = Field(description="One of `evaluate.tasks`.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    not_worse_than: tuple[Literal["base", "experts", "uniform", "previous"], ...] = Field(
        ("uniform",),
        min_length=1,
        description="`uniform`: each twin, the same merge with one density everywhere or without "
        "statistics; `previous`: the merge now in `publish.repo`.",
    )
    tolerance: float = Field(0.0, ge=0, description="How much worse is no matter.")
    on_refusal: Literal["stop", "pull-request"] = Field(
        "stop", description="With --push: nothing is pushed, or a marked pull request opened."
    )


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


Gates = Annotated[
    tuple[Gate, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_more, json_schema_input_type=Gate | tuple[Gate, ...]),
]
