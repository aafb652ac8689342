"""Heads that `config.json` ties to the embeddings: a stored copy is left out of the merge.

Qwen3's smaller models store both. Settings, random bits and statistics go by the names of tensors,
so that two copies would be merged into different values, of which programs load one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from huggingface_hub import HfApi

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.errors import SourceError
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.source import Source
from lewis_hub.workflow.open import MergeSources, OpenedSource, ties

FIRST_BYTES = 1 << 16  # that a check compares, before weights are downloaded
PIECE_BYTES = 32 << 20


def without_copies(sources: MergeSources) -> MergeSources:
    """Leave out stored heads that are tied to the embeddings, if the donor's configuration ties.

    A source whose configuration lacks `tie_word_embeddings` goes by the donor. A donor without this
    key ties if it stores no head, or if its architecture does by default, as Gemma.
    """
    return sources.replaced(_without_copy) if _is_tied(sources.donor) else sources


def _is_tied(donor: OpenedSource) -> bool:
    stated = ties(donor.config)
    if stated is not None:
        return stated
    return not any(map(names.may_be_tied, donor.checkpoint.tensors)) or _ties_by_default(donor)


def _ties_by_default(donor: OpenedSource) -> bool:
    from transformers import CONFIG_MAPPING  # imports torch: only here

    kind = str(donor.config.get("model_type"))
    known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None
    return bool(getattr(known, "tie_word_embeddings", False))


def _without_copy(one: OpenedSource) -> OpenedSource:
    tensors = dict(one.checkpoint.tensors)
    head = next((name for name in tensors if names.may_be_tied(name)), None)
    if head is None or ties(one.config) is False or _is_changed(one, tensors[head]):
        return one
    stored = tensors.pop(head)
    table = table_of(one, stored)
    if table is None:
        return one
    return replace(one, checkpoint=replace(one.checkpoint, tensors=tensors), copied_head=stored)


def table_of(one: OpenedSource, head: TensorHeader) -> TensorHeader | None:
    """Return the embeddings that a head may be tied to; None if there are none, or several."""
    tensors = one.checkpoint.tensors.items()
    tables = [t for name, t in tensors if names.is_token_embedding(name) and t.shape == head.shape]
    return tables[0] if len(tables) == 1 else None


def _is_changed(one: OpenedSource, head: TensorHeader) -> bool:
    """Return whether an adapter changes the head otherwise than the embeddings."""
    if head.adapted is None:
        return False
    tables = (t for name, t in one.checkpoint.tensors.items() if names.is_token_embedding(name))
    return head.adapted.own not in [table.adapted.own for table in tables if table.adapted]


def copy_notes(donor: OpenedSource) -> list[str]:
    """Return the note that the merge lacks a tensor of the model it starts from."""
    if donor.copied_head is None:
        return []
    name = donor.copied_head.name
    return [
        f"{donor.name} stores `{name}`, which its config.json ties to the embeddings: the merge "
        "stores the embeddings alone."
    ]


def require_copies(api: HfApi, sources: Iterable[OpenedSource], n_bytes: int | None = None) -> None:
    """Compare the first `n_bytes` of heads that were left out with the embeddings; None: all bytes.

    Raises:
        SourceError: a head differs from the embeddings, or they cannot be read.
    """
    for one in sources:
        head = one.copied_head
        table = table_of(one, head) if head else None
        if head is None or table is None or head.is_computed or table.is_computed:
            continue
        if one.source.is_adapter:  # both are of its base, which is compared itself
            continue
        if head.dtype != table.dtype or _differ(api, one.source, (head, table), n_bytes):
            problem = (
                f"its config.json ties the head to the embeddings, but its file stores a "
                f"`{head.name}` that differs from `{table.name}`, and programs disagree which of "
                "the two they load as the head"
            )
            remedy = (
                "Use a copy of the model in which config.json says `tie_word_embeddings: false`, "
                f"or whose file has no `{head.name}`."
            )
            raise SourceError(one.pinned, problem, remedy)


def _differ(
    api: HfApi, source: Source, tensors: tuple[TensorHeader, ...], n_bytes: int | None
) -> bool:
    read, end = partial(read_range, api, source), min(t.n_bytes for t in tensors)
    end = end if n_bytes is None else min(end, n_bytes)
    for start in range(0, end, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, end)
        pieces = {read(t.shard, t.start + start, t.start + stop) for t in tensors}
        if len(pieces) > 1:
            return True
    return False
