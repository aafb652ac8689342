"""How a model is matched with another one before they are merged, in a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lewis_hub.recipe.reference import Part

NAMED = {  # in `align`
    "dual_space": "method",
    "segment_wise": "depth",
    "neuron_matching": "width",
    "neuron_zipping": "width",
}
EXPECTED = (
    "expected `method: dual_space`, `depth: segment_wise`, `width: neuron_matching` or "
    "`neuron_zipping`, or `depth` and one of the others"
)


def _named_method(value: Any) -> Any:
    """The name of a method stands for its default settings."""
    if not isinstance(value, str):
        return value
    if value not in NAMED:
        *others, last = (f"`{name}`" for name in NAMED)
        raise ValueError(f"expected {', '.join(others)} or {last}, found {value!r}")
    return {NAMED[value]: value}


class Align(Part):
    """How a model is matched with the base before the merge, or with the first model if none is.

    First the blocks of a model of another depth are put in the places of the base's. Then its units
    are permuted, for a model without a common base, or matched across two widths.
    """

    method: Literal["dual_space"] | None = Field(
        None,
        description="How units are matched. `dual_space`: by activations on the calibration texts, "
        "and by weights. Absent: they stay in their places.",
    )
    depth: Literal["segment_wise"] | None = Field(
        None,
        description="How blocks are matched. `segment_wise`: by their outputs on the calibration "
        "texts, and by weights; with `method` or `width` by what they add to the hidden state "
        "alone. Absent: both models have the same number.",
    )
    width: Literal["neuron_matching", "neuron_zipping"] | None = Field(
        None,
        description="How units of models of different width are matched. `neuron_matching`: one "
        "to one, as `dual_space`; units without a partner are left out. `neuron_zipping`: of an "
        "MLP they are averaged onto the unit that they resemble most. Absent: both have one size.",
    )
    weight_similarity: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the similarity of weights. The rest is that of activations. With 1, "
        "no texts are needed, but for `width` and for `method` with `depth`.",
    )

    @property
    def matches_units(self) -> bool:
        """Whether units are matched, of one width or two; otherwise blocks alone are."""
        return self.method is not None or self.width is not None

    @property
    def needs_texts(self) -> bool:
        """Whether the models are run on texts."""
        return self.weight_similarity < 1 or self.always_runs

    @property
    def always_runs(self) -> bool:
        """Whether weights alone do not suffice.

        Before units are matched, blocks are compared on texts alone. For another width, the scales
        of norms are measured.
        """
        return self.width is not None or (self.matches_units and self.depth is not None)

    @model_validator(mode="after")
    def _is_one_of_the_kinds(self) -> Align:
        if not (self.matches_units or self.depth) or (self.method and self.width):
            raise ValueError(EXPECTED)
        return self


Alignment = Annotated[
    Align,
    BeforeValidator(
        _named_method,
        json_schema_input_type=Align
        | Literal["dual_space", "segment_wise", "neuron_matching", "neuron_zipping"],
    ),
]
