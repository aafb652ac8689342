"""Alignments from vocabularies: by token where they differ, by row where one is only longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.merge.alignment import Alignment
from lewis_hub.vocabulary.tokens import Vocabulary


def token_tensors(checkpoint: Checkpoint, n_tokens: int | None) -> tuple[str, ...]:
    """The tensors with a row a token, whatever they are called: embeddings, heads and their biases.

    They are outside the blocks and have as many rows as the vocabulary; a table of positions that
    happens to be as long is told by its name.

    Args:
        checkpoint: of the base.
        n_tokens: rows, as its configuration says; None where it does not: then as many as the
            first tensor that is called an embedding.
    """
    tensors = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if (len(tensor.shape) == 2 and names.may_have_tokens(name))
        or (len(tensor.shape) == 1 and names.is_head(name))
    }
    if n_tokens is None:
        lengths = (shape[0] for name, shape in tensors.items() if names.is_input_side(name))
        n_tokens = next(lengths, None)
    return tuple(name for name, shape in tensors.items() if shape[0] == n_tokens)


def rows_of(checkpoint: Checkpoint, tensors: Sequence[str]) -> int:
    """How many rows a source has for tokens."""
    return max(
        (checkpoint.tensors[name].shape[0] for name in tensors if name in checkpoint.tensors),
        default=0,
    )


def by_row(base: Checkpoint, sources: Sequence[Checkpoint], tensors: Sequence[str]) -> Alignment:
    """Row i means the same in all sources; some have fewer, and then the base's stand in.

    Args:
        base: which has as many rows as the merge will have.
        sources: all that are merged.
        tensors: with a row a token.
    """
    n_rows = rows_of(base, tensors)
    every = np.arange(n_rows, dtype=np.int32)
    ids = {source.label: every for source in sources}
    return Alignment(frozenset(tensors), n_rows, ids, base.label)


def by_token(
    merged: Vocabulary,
    vocabularies: Mapping[str, Vocabulary],
    tensors: Sequence[str],
    n_rows: int,
    base: str,
    padding: str,
) -> Alignment:
    """A row of the merge is a token of its vocabulary, wherever the sources have it.

    Args:
        merged: vocabulary of the merge.
        vocabularies: label of a source -> its own.
        tensors: with a row a token.
        n_rows: of the merge.
        base: label of the source whose rows stand in for those that others lack.
        padding: label of the source whose rows are taken where the merge has no token.
    """
    ids = {label: np.full(n_rows, -1, np.int32) for label in vocabularies}
    ids[padding][:] = np.arange(n_rows)
    for token, row in merged.ids.items():
        if row < n_rows:
            for label, vocabulary in vocabularies.items():
                ids[label][row] = vocabulary.ids.get(token, -1)
    return Alignment(frozenset(tensors), n_rows, ids, base)
