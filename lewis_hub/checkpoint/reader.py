"""A checkpoint: its headers, and its tensors piece by piece, mapped or by positioned reads."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from lewis_hub.checkpoint.header import (
    ReadRange,
    ShardHeader,
    TensorHeader,
    read_header,
    torch_dtypes,
)
from lewis_hub.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from torch import Tensor


__all__ = [
    "Checkpoint",
    "ReadRange",
    "Reader",
    "TensorHeader",
    "TensorReader",
    "read_headers",
    "whole_tensor",
]

LEAST_MAPPED = 1 << 16  # bytes: fewer are read sooner than they are mapped
POPULATE_READ = 22  # of madvise, since Linux 5.14; `mmap` does not name it
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
N_REQUESTS = 8  # headers read at once


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a source by name, in the order of its shards and of the bytes in them."""

    label: str  # the source, for messages
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    base: str | None = None  # of an adapter: label of the checkpoint that all else lies in

    @property
    def is_computed(self) -> bool:
        """Whether a tensor of it lies in no file as it is."""
        return any(tensor.is_computed for tensor in self.tensors.values())


def read_headers(
    label: str, sizes: Mapping[str, int], read: ReadRange, index: bytes | None
) -> Checkpoint:
    """Read the headers of a checkpoint, and no weight.

    Args:
        label: the source, for messages.
        sizes: bytes of each of its safetensors files.
        read: called from several threads.
        index: the content of ``model.safetensors.index.json``; None where there is none.

    Raises:
        BrokenCheckpointError: a file is broken, is missing, or is not what the index says.
    """
    located = _weight_map(label, index) if index is not None else {}
    shards = sorted(set(located.values())) if index is not None else [_single(label, sizes)]
    for shard in shards:
        if shard not in sizes:
            raise _bad_index(label, f"it names the shard `{shard}`, which is not there")
    with ThreadPoolExecutor(min(N_REQUESTS, len(shards))) as pool:
        headers = pool.map(lambda shard: read_header(label, shard, sizes[shard], read), shards)
        by_shard = dict(zip(shards, headers, strict=True))
    held = {shard: {t.name for t in header.tensors} for shard, header in by_shard.items()}
    for name, shard in located.items():
        if name not in held[shard]:
            raise _bad_index(label, f"it puts `{name}` into `{shard}`, which does not hold it")
    return Checkpoint(label, _together(label, by_shard, located), _metadata(by_shard))


def local_header(label: str, file: Path) -> ShardHeader:
    """Read the header of one local file, whose name is its shard's.

    Raises:
        BrokenCheckpointError: it is broken.
    """
    with file.open("rb") as opened:
        return read_header(
            label,
            file.name,
            file.stat().st_size,
            lambda _, start, stop: os.pread(opened.fileno(), stop - start, start),
        )


def local_checkpoint(label: str, folder: Path) -> Checkpoint:
    """Read the headers of a local folder.

    Raises:
        BrokenCheckpointError: as `read_headers`.
    """
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}

    def read(shard: str, start: int, stop: int) -> bytes:
        with (folder / shard).open("rb") as file:
            return os.pread(file.fileno(), stop - start, start)

    index = folder / INDEX
    return read_headers(label, sizes, read, index.read_bytes() if index.exists() else None)


def _together(
    label: str, by_shard: Mapping[str, ShardHeader], located: Mapping[str, str]
) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for shard, header in by_shard.items():
        for tensor in header.tensors:
            if located.get(tensor.name, shard) != shard:
                continue  # a second copy: the index says which one counts
            if tensor.name in tensors:
                other = tensors[tensor.name].shard
                raise _bad_index(label, f"`{tensor.name}` is in both `{other}` and `{shard}`")
            tensors[tensor.name] = tensor
    return tensors


def _metadata(by_shard: Mapping[str, ShardHeader]) -> dict[str, str]:
    return {key: value for one in by_shard.values() for key, value in one.metadata.items()}


def _single(label: str, sizes: Mapping[str, int]) -> str:
    if SINGLE in sizes:
        return SINGLE
    if len(sizes) == 1:
        return next(iter(sizes))
    found = ", ".join(sorted(sizes)) or "none"
    raise BrokenCheckpointError(
        label,
        f"it has neither {SINGLE} nor {INDEX}; safetensors files found: {found}",
        "Several shards need an index: save the model again with `save_pretrained`.",
    )


def _bad_index(label: str, problem: str) -> BrokenCheckpointError:
    remedy = "Index and shards do not belong together: use an intact copy."
    return BrokenCheckpointError(f"{label}: {INDEX}", problem, remedy)


def _weight_map(label: str, index: bytes) -> dict[str, str]:
    try:
        document: Any = json.loads(index)
    except (ValueError, RecursionError):
        raise _bad_index(label, "it is not JSON") from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise _bad_index(label, "it has no `weight_map` from tensors to shards")
    for name, shard in found.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise _bad_index(label, f"it puts `{name}` into {shard!r}, which is no plain file name")
    return found


def _is_plain(shard: str) -> bool:
    """A file name in the folder itself, and nothing that leads out of it."""
    plain = PurePosixPath(shard).name == shard and "\\" not in shard and "\0" not in shard
    return plain and not shard.startswith(".") and shard.endswith(".safetensors")


class Reader(Protocol):
    """The tensors of a checkpoint, wherever they come from. Threads may share it; close it."""

    def __enter__(self) -> Reader: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on."""

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """The bytes that `read` copies, in the place where they lie; None: they have to be read.

        They begin at an even address, and stay for as long as the view does.
        """

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""


class TensorReader:
    """The tensors of a checkpoint in a local folder. Threads may share it; close it.

    Args:
        folder: holds the shards.
        label: the source, for messages.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self._folder, self._label = folder, label
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on.

        Raises:
            BrokenCheckpointError: the file is missing, or ends before that.
        """
        descriptor = self._descriptors.get(tensor.shard) or self._open(tensor.shard)
        position = tensor.start + first_byte
        while into.nbytes:
            n_read = os.preadv(descriptor, [into], position)
            if n_read == 0:
                raise self._broken(tensor.shard, f"it ends within `{tensor.name}`")
            into, position = into[n_read:], position + n_read

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """A map of the file, of these bytes alone: a page that is mapped counts as memory.

        All pages are brought in here, where what cannot be read is an error. A page that fails
        when the memory is touched would kill the process.
        """
        position = tensor.start + first_byte
        if n_bytes < LEAST_MAPPED or position % 2:
            return None
        descriptor = self._descriptors.get(tensor.shard) or self._open(tensor.shard)
        before = position % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(
                descriptor, before + n_bytes, prot=mmap.PROT_READ, offset=position - before
            )
            mapped.madvise(POPULATE_READ)
        except (OSError, ValueError):  # not by this kernel or file system, or the file is too short
            return None
        return memoryview(mapped)[before:]

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)

    def _open(self, shard: str) -> int:
        with self._opening:
            if shard not in self._descriptors:
                try:
                    self._descriptors[shard] = os.open(self._folder / shard, os.O_RDONLY)
                except OSError as error:
                    raise self._broken(shard, f"it cannot be read: {error.strerror}") from None
            return self._descriptors[shard]

    def _broken(self, shard: str, problem: str) -> BrokenCheckpointError:
        remedy = "It changed since it was checked: restore it, then run again."
        return BrokenCheckpointError(f"{self._label}: {shard}", problem, remedy)


def whole_tensor(reader: Reader, tensor: TensorHeader) -> Tensor:
    """What `Reader.tensor` says, by its `read`.

    It lies where torch puts tensors: products of matrices are rounded otherwise, on some
    processors, where one begins at an odd place of a line of the cache.
    """
    import torch

    held = torch.empty(tensor.n_bytes, dtype=torch.uint8)
    reader.read(tensor, 0, held.numpy().data)
    return held.view(torch_dtypes()[tensor.dtype]).reshape(tensor.shape).float()
