"""Second moments for tables of token embeddings: how often the calibration texts have each token.

The input of such a table is one-hot. So its second moments are diagonal, and the entry of a token
is its share of all tokens. No model has to run for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import local_header
from lewis_hub.merge.alignment import token_tensors
from lewis_hub.merge.plan import Gram, MergePlan, Moments, Statistics
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.texts import Sets, remap_token_ids

if TYPE_CHECKING:
    from torch import Tensor

OPTION = "embeddings"
NO_TABLE = "`embeddings` has no effect: no tensor is known by its name as token embeddings."


def asks_for_tables(planned: MergePlan) -> bool:
    """Whether the option is set for some tensor."""
    return any(tensor.options.get(OPTION) for shard in planned.shards for tensor in shard.tensors)


def tables(planned: MergePlan, sources: MergeSources) -> dict[str, int]:
    """The token embeddings that are fitted, by name, with their number of rows in the merge.

    Heads are no embeddings. Tables of other things than tokens are known by names and numbers of
    rows, as for `tokenizer_source`.
    """
    with_tokens = token_tensors(sources.donor.checkpoint, None)
    return {
        tensor.output.name: tensor.output.shape[0]
        for shard in planned.shards
        for tensor in shard.tensors
        if tensor.options.get(OPTION)
        and not tensor.is_copied
        and tensor.output.name in with_tokens
        and names.is_token_embedding(tensor.output.name)
    }


def merged_tokens(
    sets: Sets, reader: OpenedSource, sources: MergeSources
) -> tuple[CalibrationTokens, ...]:
    """The texts of each expert in the ids of the merged model, which `reader` shares."""
    return tuple(remap_token_ids(one, reader, sources.donor.name).tokens for one in sets)


def shares(texts: CalibrationTokens, n_rows: int) -> Tensor:
    """The share of each token in the texts, as second moments: (n_rows, 1, 1) float32."""
    import torch

    ids = torch.tensor([one for text in texts.ids for one in text])
    counts = torch.bincount(ids, minlength=n_rows)[:n_rows]
    return (counts / len(ids)).float().view(n_rows, 1, 1)


def moments(wanted: Mapping[str, int], tokens: Sequence[CalibrationTokens]) -> dict[str, Moments]:
    """The second moments of each table of `wanted`, name -> number of rows."""
    return {
        name: Moments([shares(one, n_rows) for one in tokens], transposed=True)
        for name, n_rows in wanted.items()
    }


def with_tables(
    known: Iterable[Statistics],
    wanted: Mapping[str, int],
    tokens: Sequence[CalibrationTokens],
    folders: Iterable[Path],
) -> tuple[Statistics, ...]:
    """Add the moments of tables to the statistics of each expert, in a file in their folder."""
    pairs = zip(known, tokens, folders, strict=True)
    return tuple(_with_tables(one, wanted, texts, folder) for one, texts, folder in pairs)


def _with_tables(
    known: Statistics, wanted: Mapping[str, int], texts: CalibrationTokens, folder: Path
) -> Statistics:
    from lewis_hub.calibration.grams import write_tensors

    told = f"{texts.facts['tokens_digest']} {sorted(wanted.items())}"
    digest = hashlib.sha256(told.encode()).hexdigest()
    file = folder / f"tokens-{digest[:16]}.safetensors"
    if not file.exists():
        write_tensors({name: shares(texts, n_rows) for name, n_rows in wanted.items()}, file)
    stored: Iterable[TensorHeader] = local_header(known.label, file)
    added = {header.name: Gram(header, transposed=True) for header in stored}
    return replace(known, digest=f"{known.digest} {digest}", grams={**known.grams, **added})
