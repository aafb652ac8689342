"""What an output checkpoint looks like, known before any of its bytes: shards, headers, index."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import INDEX, SINGLE

ALIGNMENT = 8
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as safetensors writes them


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """The number of elements: 1 for a 0-d tensor."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Its size on disk."""
        return self.n_elements * WIDTHS[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """One file: its header, and where each tensor's bytes begin in it."""

    name: str
    tensors: tuple[OutputTensor, ...]  # in the order of their bytes

    @property
    def header(self) -> bytes:
        """The file's first bytes, padded so that the tensors' bytes are aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (position, position + tensor.n_bytes),
            }
            position += tensor.n_bytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    @property
    def starts(self) -> tuple[int, ...]:
        """Per tensor the offset of its first byte from the beginning of the file."""
        position, starts = len(self.header), []
        for tensor in self.tensors:
            starts.append(position)
            position += tensor.n_bytes
        return tuple(starts)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.n_bytes for tensor in self.tensors)


def lay_out(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> tuple[ShardLayout, ...]:
    """Split tensors into shards as huggingface_hub does, greedily in the order given.

    A tensor above `max_shard_bytes` gets a shard of its own. Within a shard wider dtypes come
    first, as safetensors has it, so that every tensor is aligned; otherwise the order stays.
    """
    groups: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    current_bytes = 0
    for tensor in tensors:
        if tensor.n_bytes > max_shard_bytes:
            groups.append([tensor])
            continue
        if current and current_bytes + tensor.n_bytes > max_shard_bytes:
            groups.append(current)
            current, current_bytes = [], 0
        current.append(tensor)
        current_bytes += tensor.n_bytes
    if current or not groups:
        groups.append(current)
    return tuple(
        ShardLayout(
            shard_name(i, len(groups)), tuple(sorted(group, key=lambda t: -WIDTHS[t.dtype]))
        )
        for i, group in enumerate(groups)
    )


def index_document(shards: Sequence[ShardLayout]) -> str | None:
    """The text of ``model.safetensors.index.json`` as transformers writes it.

    None for a single shard, which has no index.
    """
    if len(shards) == 1:
        return None
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    weight_map: Mapping[str, str] = {t.name: s.name for s in shards for t in s.tensors}
    metadata = {
        "total_parameters": sum(tensor.n_elements for tensor in tensors),
        "total_size": sum(tensor.n_bytes for tensor in tensors),
    }
    document = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def weight_file_names(shards: Sequence[ShardLayout]) -> tuple[str, ...]:
    """All files that hold or locate weights."""
    return tuple(shard.name for shard in shards) + ((INDEX,) if len(shards) > 1 else ())


def shard_name(i: int, n_shards: int) -> str:
    """The file of the i-th of so many shards, as transformers calls it."""
    return SINGLE if n_shards == 1 else f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
