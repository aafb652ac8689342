"""From the ids of one tokenizer to those of another, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lewis_hub.vocabulary.tokens import Vocabulary


@dataclass(frozen=True)
class Translation:
    """What the ids of one vocabulary are in another.

    Attributes:
        ids: id -> the other's id of the same token.
        lacking: id -> the token, where the other has none or no row for it.
    """

    ids: Mapping[int, int]
    lacking: Mapping[int, str]


def translation(ours: Vocabulary, theirs: Vocabulary, n_rows: int) -> Translation:
    """Find each token of a vocabulary in another, whose embeddings have so many rows."""
    ids, lacking = {}, {}
    for token, row in sorted(ours.ids.items(), key=lambda item: item[1]):  # told in this order
        own = theirs.ids.get(token, n_rows)
        if own < n_rows:
            ids[row] = own
        else:
            lacking[row] = token
    return Translation(ids, lacking)
