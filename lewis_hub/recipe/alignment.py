"""How a model is matched with another one before they are merged, in a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lewis_hub.recipe.reference import Part

NAMED = {"dual_space": "method", "segment_wise": "depth"}  # in `align`


def _named_method(value: Any) -> Any:
    """The name of a method stands for its default settings."""
    if not isinstance(value, str):
        return value
    if value not in NAMED:
        raise ValueError(f"expected `dual_space` or `segment_wise`, found {value!r}")
    return {NAMED[value]: value}


class Align(Part):
    """How a model is matched with the base before the merge, or with the first model if none is.

    First the blocks of a model of another depth are put in the places of the base's, then the units
    of a model without a common base are permuted.
    """

    method: Literal["dual_space"] | None = Field(
        None,
        description="How units are matched. `dual_space`: by activations on the calibration texts, "
        "and by weights. Absent: they stay in their places.",
    )
    depth: Literal["segment_wise"] | None = Field(
        None,
        description="How blocks are matched. `segment_wise`: by their outputs on the calibration "
        "texts, and by weights. Absent: both models have the same number.",
    )
    weight_similarity: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the similarity of weights. The rest is that of activations. With 1, "
        "no texts are needed.",
    )

    @property
    def needs_texts(self) -> bool:
        """Whether the models are run on texts."""
        return self.weight_similarity < 1 or self.matches_both

    @property
    def matches_both(self) -> bool:
        """Whether blocks and units are matched: then blocks are matched by their outputs alone."""
        return self.method is not None and self.depth is not None

    @model_validator(mode="after")
    def _names_one(self) -> Align:
        if not (self.method or self.depth):
            raise ValueError("expected `method: dual_space`, `depth: segment_wise` or both")
        return self


Alignment = Annotated[
    Align,
    BeforeValidator(
        _named_method, json_schema_input_type=Align | Literal["dual_space", "segment_wise"]
    ),
]
