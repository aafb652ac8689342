"""Which parts of a task vector an extracted LoRA adapter holds, and in which form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.errors import ExtractionError

Form = Literal["low-rank", "whole", "left out"]
RANK = 32  # of updates, unless a rank or an error is given


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA adapter holds of the difference between a model and its base.

    Attributes:
        rank: highest rank of a module's update; None: 32, or with `error` no limit.
        error: in [0, 1); each module gets the lowest rank whose relative error, in the Frobenius
            norm of the task vector, is at most this. 0: each module gets the highest rank.
        include: regular expression; only modules in whose names it is found are stored.
        exclude: regular expression; modules in whose names it is found are left out.
        save: ends of module names; these modules are stored whole, such as `lm_head`.
        embeddings: `whole`, or `low-rank`: embeddings and head become low-rank updates too.
    """

    rank: int | None = None
    error: float = 0.0
    include: str | None = None
    exclude: str | None = None
    save: tuple[str, ...] = ()
    embeddings: Literal["whole", "low-rank"] = "whole"

    def __post_init__(self) -> None:
        for option, pattern in (("include", self.include), ("exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                problem = f"`{option}`: {pattern!r} is not a regular expression: {error}."
                raise ExtractionError((problem,)) from None

    @property
    def most(self) -> int | None:
        """The highest rank of an update; None: no limit."""
        return self.rank or (None if self.error else RANK)

    def form(self, tensor: TensorHeader, *, is_matrix: bool) -> Form:
        """The form of a tensor that differs; `is_matrix`: it is a matrix of a block."""
        module = names.module(tensor.name)
        if self.include is not None and not re.search(self.include, module):
            return "left out"
        if self.exclude is not None and re.search(self.exclude, module):
            return "left out"
        if any(f".{module}".endswith(f".{name}") for name in self.save):
            return "whole"
        is_outer = is_embedding(tensor) or (names.is_head(tensor.name) and len(tensor.shape) == 2)
        if is_outer and self.embeddings == "low-rank":
            return "low-rank"
        return "low-rank" if is_matrix else "whole"


def is_embedding(tensor: TensorHeader) -> bool:
    """Whether a tensor is a table of token embeddings."""
    return len(tensor.shape) == 2 and names.is_token_embedding(tensor.name)
