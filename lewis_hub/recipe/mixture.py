"""The experts of a mixture-of-experts model, as a configuration of mergekit-moe lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lewis_hub.recipe.reference import ModelReference, Part

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
WITHOUT_PROMPTS = frozenset({"random", "uniform_random"})
METHOD = "passthrough"  # each tensor is that of one model
DEFAULTS = {"merge_method": METHOD, "gate_mode": "hidden", "experts_per_token": 2}


def _listed(value: Any) -> Any:
    """A single text stands for a list of one, nothing for an empty list."""
    return [] if value is None else [value] if isinstance(value, str) else value


Prompts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...] | None),
]


class RoutedExpert(Part):
    """A dense model whose MLPs become one expert of each block."""

    source_model: ModelReference = Field(description="A dense model of the base's architecture.")
    positive_prompts: Prompts = Field((), description="Texts that this expert should get.")
    negative_prompts: Prompts = Field((), description="Texts that it should not get.")
    residual_scale: float | None = Field(
        None, description="Factor of the expert's output: its down projections are multiplied."
    )
    noise_scale: float | None = Field(
        None, description="mergekit's random noise on the weights. Only 0 is supported."
    )


class Mixture(Part):
    """The fields of a recipe for a mixture of experts."""

    routed: tuple[RoutedExpert, ...] | None = Field(
        None,
        alias="experts",
        min_length=1,
        description="Dense models whose MLPs become the experts of a mixture-of-experts model.",
    )
    shared_experts: tuple[RoutedExpert, ...] | None = Field(
        None, description="An expert that every token passes, beside the routed experts."
    )
    gate_mode: GateMode | None = Field(
        None, description="What the router weights are made of. Default: `hidden`."
    )
    experts_per_token: int | None = Field(
        None, description="The number of routed experts that each token passes. Default: 2."
    )
    architecture: str | None = Field(
        None, description="Architecture of the mixture, if the models allow several."
    )

    @model_validator(mode="before")
    @classmethod
    def _as_mixture(cls, document: Any) -> Any:
        """A list of experts has defaults of its own."""
        if not isinstance(document, Mapping) or document.get("experts") is None:
            return document
        return DEFAULTS | {key: value for key, value in document.items() if value is not None}

    @property
    def mixed(self) -> tuple[RoutedExpert, ...]:
        """The routed experts of a mixture, then the shared expert; empty for other merges."""
        return (*(self.routed or ()), *(self.shared_experts or ()))
