"""What a recipe asks of the tokenizer, in mergekit's words. Models are named as the recipe does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from lewis_hub.recipe_settings import Part

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # that come with the package


class ModelToken(Part):
    """A token of one of the models, by its text or its id."""

    kind: Literal["model_token"]
    model: str = Field(min_length=1)
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_name(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give `token` (its text) or `token_id`")
        return self


class Zero(Part):
    """No token at all: zeros."""

    kind: Literal["zero"]


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", "model")
    return kind if kind in ("model", "zero") else "model_token"


Origin = Annotated[
    Annotated[str, Tag("model")]
    | Annotated[ModelToken, Tag("model_token")]
    | Annotated[Zero, Tag("zero")],
    Discriminator(_kind),
]


class TokenEmbedding(Part):
    """Whose row a token gets, instead of the usual rule."""

    source: Origin | None = Field(
        None, description="One of the models, {kind: model_token, ...} or {kind: zero}."
    )
    force: bool = Field(default=False, description="Also for the models that have the token.")

    @property
    def model(self) -> str | None:
        """The model whose row it is, as it is written; None for zeros and for the usual rule."""
        if isinstance(self.source, str):
            return self.source
        return self.source.model if isinstance(self.source, ModelToken) else None


class Tokenizer(Part):
    """The tokenizer of the merge, and how its embeddings are put together."""

    source: str = Field("union", description="base, union, or one of the models.")
    tokens: Mapping[str, TokenEmbedding] = Field(
        default_factory=dict, description="By the token's text; new ones are added."
    )
    pad_to_multiple_of: int | None = Field(None, ge=1, description="Of the rows of embeddings.")

    @field_validator("tokens", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value
