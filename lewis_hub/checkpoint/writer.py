"""Output shards: how tensors are laid out in files, and a file that several threads write.

A shard is preallocated, its tensors are written in place, and its bytes are hashed meanwhile.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import SINGLE
from lewis_hub.errors import OutputError
from lewis_hub.files import unwritable
from lewis_hub.system import create_binary, leave_cache, read_at, reserve, write_at

ALIGNMENT = 8
# a recipe's dtypes -> safetensors'
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
HASHED_BYTES = 1 << 20  # read back at a time
UNWRITTEN_BYTES = 64 << 20  # the last bytes written, which the disk may not have taken yet


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write; `dtype` as safetensors spells it."""

    name: str
    dtype: str
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
    """The header of one output file, and the offset of each tensor in it."""

    name: str
    tensors: tuple[OutputTensor, ...]  # in the order of their bytes

    @property
    def header(self) -> bytes:
        """The first bytes of the file, padded so that the tensors are aligned."""
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
        """The offset of each tensor's first byte from the beginning of the file."""
        sizes = (tensor.n_bytes for tensor in self.tensors)
        return tuple(accumulate(sizes, initial=len(self.header)))[:-1]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.n_bytes for tensor in self.tensors)


def lay_out(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> tuple[ShardLayout, ...]:
    """Split tensors into shards as huggingface_hub does: greedily, in the order given.

    A tensor above `max_shard_bytes` gets a shard of its own. Within a shard wider dtypes come
    first, as in safetensors, so that every tensor is aligned; otherwise the order stays.
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
    """The text of ``model.safetensors.index.json`` as in transformers; None for one shard."""
    if len(shards) == 1:
        return None
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    metadata = {
        "total_parameters": sum(tensor.n_elements for tensor in tensors),
        "total_size": sum(tensor.n_bytes for tensor in tensors),
    }
    document = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def shard_name(i: int, n_shards: int) -> str:
    """The file name of shard `i` of `n_shards`, as transformers writes it; `i` counts from 0."""
    return SINGLE if n_shards == 1 else f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"


class ShardWriter:
    """A shard that is being written. Threads may share it if they write disjoint ranges.

    The file is hashed in the order of its bytes while it is written: a range that is next from the
    memory that it was written from, a later one from the page cache, by the thread that wrote what
    was missing. `stays_cached` says whether the page cache keeps bytes that are already on the
    disk. All methods raise an OutputError if the disk is full or failing; the whole shard is
    reserved at the beginning.
    """

    def __init__(self, folder: Path, layout: ShardLayout, *, stays_cached: bool) -> None:
        self.path = folder / layout.name
        self.n_bytes = layout.n_bytes
        self._stays_cached = stays_cached
        self._digest = hashlib.sha256()
        self._n_hashed = 0
        self._written: list[tuple[int, int]] = []  # heap of ranges that are not hashed yet
        self._writing, self._hashing = threading.Lock(), threading.Lock()
        self._read_back = bytearray(HASHED_BYTES)
        try:
            self._descriptor = create_binary(self.path, os.O_RDWR | os.O_TRUNC)
        except OSError as error:
            raise unwritable(self.path, error) from None
        try:
            reserve(self._descriptor, self.n_bytes)
            self.write(0, memoryview(layout.header))
        except OSError as error:
            os.close(self._descriptor)
            raise unwritable(self.path, error) from None
        except OutputError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, position: int, content: memoryview) -> None:
        """Write final bytes at an offset from the beginning of the file; empty ones do nothing."""
        if not content.nbytes:
            return
        try:
            write_at(self._descriptor, content, position)
        except OSError as error:
            raise unwritable(self.path, error) from None
        with self._writing:
            heapq.heappush(self._written, (position, position + content.nbytes))
        while self._hashing.acquire(blocking=False):
            try:
                followed = self._hash_next(position, content)
            finally:
                self._hashing.release()
            if not followed:
                return

    def finish(self) -> str:
        """Flush the shard to the disk and return its sha256 as 64 hex digits."""
        while self._hash_next():
            pass
        assert self._n_hashed == self.n_bytes, "a range of the shard was never written"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise unwritable(self.path, error) from None
        if not self._stays_cached:
            leave_cache(self._descriptor, 0, self.n_bytes)
        return self._digest.hexdigest()

    def _hash_next(self, position: int = 0, content: memoryview | None = None) -> bool:
        """Hash the next range if it is written; `content` was written at `position`."""
        with self._writing:
            if not self._written or self._written[0][0] != self._n_hashed:
                return False
            start, stop = heapq.heappop(self._written)
        if content is not None and start == position:
            self._digest.update(content)
            self._n_hashed = stop
        while self._n_hashed < stop:
            window = memoryview(self._read_back)[: stop - self._n_hashed]
            n_read = read_at(self._descriptor, window, self._n_hashed)
            if not n_read:
                problem = "another process truncated it while it was written"
                raise OutputError(str(self.path), problem, "Run again: finished shards are kept.")
            self._digest.update(window[:n_read])
            self._n_hashed += n_read
        leave_cache(self._descriptor, start, stop)  # the disk begins now
        if not self._stays_cached:
            leave_cache(self._descriptor, 0, stop - UNWRITTEN_BYTES)
        return True
