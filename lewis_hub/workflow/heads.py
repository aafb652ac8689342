"""Heads and tables that are tied to others: a stored copy is left out of the merge.

Qwen3's smaller models store a head beside the embeddings, and older files of T5 and BART the shared
table three times. Settings, random bits and statistics go by the names of tensors, so that copies
would be merged into different values, of which programs load one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
MAX_COPIES = 100  # of a model, which has five at most: each is compared with all names
# encoder and decoder share a table, also where `tie_word_embeddings: false` gives T5 1.1 a head
SHARING = frozenset({"t5", "mt5", "umt5", "longt5", "pop2piano", "udop"})


def without_copies(sources: MergeSources) -> MergeSources:
    """Leave out stored copies of tied tensors, if the donor's configuration ties them.

    A source whose configuration lacks `tie_word_embeddings` goes by the donor. A donor without this
    key ties if it stores no head, or if its architecture does by default, as Gemma. Where a source
    stores copies alone, one of them gets the name that the table has in another source.
    """
    known: dict[str, TensorHeader] = {}
    for one in sources.models:
        known = dict(one.checkpoint.tensors) | known
    return sources.replaced(
        partial(_without_copies, known=known, donor_ties=_is_tied(sources.donor))
    )


def _is_tied(donor: OpenedSource) -> bool:
    stated = ties(donor.config)
    if stated is not None:
        return stated
    return not any(map(names.may_copy_table, donor.checkpoint.tensors)) or _ties_by_default(donor)


def _ties_by_default(donor: OpenedSource) -> bool:
    from transformers import CONFIG_MAPPING  # imports torch: only here

    kind = str(donor.config.get("model_type"))
    if kind in SHARING or kind not in CONFIG_MAPPING:
        return kind in SHARING
    return bool(getattr(CONFIG_MAPPING[kind], "tie_word_embeddings", False))


def _without_copies(
    one: OpenedSource, known: Mapping[str, TensorHeader], *, donor_ties: bool
) -> OpenedSource:
    ties_head = donor_ties and ties(one.config) is not False
    shares = ties_head or one.config.get("model_type") in SHARING
    tensors, copies = dict(one.checkpoint.tensors), []
    tied = [
        copy
        for name, copy in tensors.items()
        if _may_be_copy(name, shares=shares, ties_head=ties_head)
    ]
    for copy in tied if len(tied) <= MAX_COPIES else ():
        name = copy.name
        table = _table_of(copy, tensors)
        if table and not _is_changed(copy, table):
            copies.append((tensors.pop(name), table))
        elif not table and (named := _table_of(copy, known)) and named.name not in tensors:
            tensors[named.name] = replace(tensors.pop(name), name=named.name)
    return replace(one, checkpoint=replace(one.checkpoint, tensors=tensors), copies=tuple(copies))


def _may_be_copy(name: str, *, shares: bool, ties_head: bool) -> bool:
    if names.shared_table(name):
        return shares
    return ties_head and (names.may_copy_table(name) or names.bias_of_head(name) is not None)


def _table_of(copy: TensorHeader, tensors: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """Return what a tensor may be tied to; None if there is nothing, or it is not clear what."""
    owner = names.shared_table(copy.name) or names.bias_of_head(copy.name)
    if owner is not None:
        found = tensors.get(owner)
        return found if found and found.shape == copy.shape else None
    alike = {n: t for n, t in tensors.items() if t.shape == copy.shape and n != copy.name}
    tables = [n for n in alike if n.split(".")[-2:] == ["shared", "weight"]]
    tables = tables or list(filter(names.is_token_embedding, alike))
    if len(tables) > 1:  # an encoder and a decoder with tables of their own
        tables = [name for name in tables if name.endswith("decoder.embed_tokens.weight")]
    return alike[tables[0]] if len(tables) == 1 else None


def _is_changed(copy: TensorHeader, table: TensorHeader) -> bool:
    """Return whether an adapter changes a copy otherwise than the table."""
    if copy.adapted is None:
        return False
    return table.adapted is None or copy.adapted.own != table.adapted.own


def copy_notes(donor: OpenedSource) -> list[str]:
    """Return notes that the merge lacks tensors of the model it starts from."""
    return [
        f"{donor.name} stores `{copy.name}`, which its config.json ties to the embeddings: the "
        "merge stores the embeddings alone."
        if names.may_copy_table(copy.name)
        else f"{donor.name} stores `{copy.name}`, which its architecture ties to `{table.name}`: "
        f"the merge stores `{table.name}` alone."
        for copy, table in donor.copies
    ]


def require_copies(api: HfApi, sources: Iterable[OpenedSource], n_bytes: int | None = None) -> None:
    """Compare the first `n_bytes` of copies that were left out with the tables; None: all bytes.

    Raises:
        SourceError: a copy differs from what it is tied to, or they cannot be read.
    """
    for one in sources:
        if one.source.is_adapter:  # both are of its base, which is compared itself
            continue
        for copy, table in one.copies:
            if copy.is_computed or table.is_computed:
                continue
            if copy.dtype != table.dtype or _differ(api, one.source, (copy, table), n_bytes):
                raise SourceError(one.pinned, *_difference(copy, table))


def _difference(copy: TensorHeader, table: TensorHeader) -> tuple[str, str]:
    """Return the problem and its remedy."""
    differs = (
        f"its file stores a `{copy.name}` that differs from `{table.name}`, and programs disagree "
        "which of the two they load"
    )
    without = f"whose file has no `{copy.name}`."
    if not names.may_copy_table(copy.name):
        problem = f"its architecture ties `{copy.name}` to `{table.name}`, but {differs}"
        return problem, f"Use a copy of the model {without}"
    problem = f"its config.json ties the head to the embeddings, but {differs} as the head"
    remedy = "Use a copy of the model in which config.json says `tie_word_embeddings: false`, or "
    return problem, f"{remedy}{without}"


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
