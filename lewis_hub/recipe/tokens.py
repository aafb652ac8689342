"""Where the tokenizer of a merge and the embeddings of its tokens come from, in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lewis_hub.recipe.reference import Part, present


class ModelToken(Part):
    """A token of one of the models, given by its text or its id."""

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
    """An embedding of zeros."""

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
    """The embedding of one token, where the default rule does not fit."""

    source: Origin | None = Field(
        None, description="One of the models, {kind: model_token, ...} or {kind: zero}."
    )
    force: bool = Field(
        default=False, description="Use `source` also in models that have the token themselves."
    )

    @property
    def model(self) -> str | None:
        """The model that gives the embedding, as written; None for zeros or the default rule."""
        if isinstance(self.source, str):
            return self.source
        return self.source.model if isinstance(self.source, ModelToken) else None


class Tokenizer(Part):
    """The tokenizer of the merge, and where the embeddings of its tokens come from."""

    source: str = Field("union", description="`base`, `union`, or one of the models.")
    tokens: Annotated[Mapping[str, TokenEmbedding], BeforeValidator(present)] = Field(
        default_factory=dict,
        description="Settings of single tokens, by their text. A new token is added.",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        le=1 << 16,
        description="Pad the number of embedding rows to a multiple of this.",
    )
