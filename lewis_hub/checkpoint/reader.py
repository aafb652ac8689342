"""A checkpoint: the headers of its shards and index, and readers of its tensors."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import ReadRange, TensorHeader, read_header, torch_dtypes
from lewis_hub.documents import MAX_TABLE_BYTES, DocumentError, read_json
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.files import TOO_MANY_OPEN
from lewis_hub.system import open_binary, read_at

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
N_REQUESTS = 8  # headers read at the same time
MAX_TENSORS = 1_000_000  # of all files; Kimi K2 with scales has 210,000
MAX_LETTERS = 100_000_000  # of the names of all tensors; Python takes four bytes for some
CHANGED = "The file changed after it was checked: restore it, then run again."


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a source by name, in the order of the shards and of the bytes in them."""

    label: str  # the source, for messages
    tensors: Mapping[str, TensorHeader]
    base: str | None = None  # of an adapter: the label of the checkpoint that stores its base

    @property
    def is_computed(self) -> bool:
        """Whether a tensor is computed while it is read: from an adapter, or from codes."""
        return any(tensor.is_computed for tensor in self.tensors.values())

    @cached_property
    def by_block(self) -> Mapping[int | None, Mapping[str, TensorHeader]]:
        """The tensors of each block; those outside the blocks are under None."""
        found: defaultdict[int | None, dict[str, TensorHeader]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            found[names.block(name)][name] = tensor
        return dict(found)

    @cached_property
    def last_blocks(self) -> Mapping[str, int]:
        """The number of the last block in each stack of blocks."""
        return names.last_blocks(self.tensors)


def read_headers(
    label: str, sizes: Mapping[str, int], read: ReadRange, index: bytes | None
) -> Checkpoint:
    """Read the headers of a checkpoint, without its weights; messages name it `label`.

    `sizes` are the bytes of its safetensors files; `index` is the content of
    `model.safetensors.index.json`, None without this file. Beside `model.safetensors` neither the
    index nor other files count, as in transformers. `read` is called from several threads.
    A BrokenCheckpointError says what is broken, missing or does not match the index.
    """
    index = None if SINGLE in sizes else index
    located = _weight_map(label, index) if index is not None else {}
    shards = sorted(set(located.values())) if index is not None else [_single(label, sizes)]
    for shard in shards:
        if shard not in sizes:
            raise _bad_index(label, f"it names the shard `{shard}`, which does not exist")
    n_tensors, n_letters, counting = 0, 0, threading.Lock()

    def header(shard: str) -> tuple[TensorHeader, ...]:
        nonlocal n_tensors, n_letters
        is_within = n_tensors <= MAX_TENSORS and n_letters <= MAX_LETTERS
        found = read_header(label, shard, sizes[shard], read) if is_within else ()
        with counting:
            n_tensors += len(found)
            n_letters += sum(len(tensor.name) for tensor in found)
        if n_tensors > MAX_TENSORS or n_letters > MAX_LETTERS:
            problem = f"its files have more than {MAX_TENSORS:,} tensors"
            if n_letters > MAX_LETTERS:
                problem = f"the names of its tensors have more than {MAX_LETTERS:,} letters"
            raise BrokenCheckpointError(label, problem, "Use an intact copy.")
        return found

    with ThreadPoolExecutor(min(N_REQUESTS, len(shards))) as pool:
        by_shard = dict(zip(shards, pool.map(header, shards), strict=True))
    stored = {(tensor.name, shard) for shard in shards for tensor in by_shard[shard]}
    for name, shard in located.items():
        if (name, shard) not in stored:
            raise _bad_index(label, f"it maps `{name}` to `{shard}`, which does not contain it")
    return Checkpoint(label, _by_name(label, by_shard, located))


def local_header(label: str, file: Path) -> tuple[TensorHeader, ...]:
    """Read the header of one local file."""
    return read_header(label, file.name, file.stat().st_size, partial(_read_local, file.parent))


def local_checkpoint(label: str, folder: Path) -> Checkpoint:
    """Read the headers of a local folder, as `read_headers` does.

    A file that is gone, or is a folder now, is a `BrokenCheckpointError`, too.
    """
    try:
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        index = None
        if (folder / INDEX).exists():
            with (folder / INDEX).open("rb") as opened:
                index = opened.read(MAX_TABLE_BYTES + 1)
        return read_headers(label, sizes, partial(_read_local, folder), index)
    except (FileNotFoundError, IsADirectoryError) as error:
        where = f"{label}: {Path(error.filename).name}"
        raise BrokenCheckpointError(
            where, f"it cannot be read: {error.strerror}", CHANGED
        ) from None


def _read_local(folder: Path, file: str, start: int, stop: int) -> bytes:
    with (folder / file).open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def _by_name(
    label: str, by_shard: Mapping[str, Sequence[TensorHeader]], located: Mapping[str, str]
) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for shard, stored in by_shard.items():
        for tensor in stored:
            if located.get(tensor.name, shard) != shard:
                continue  # a copy that the index does not use
            if tensor.name in tensors:
                other = tensors[tensor.name].shard
                raise _bad_index(label, f"`{tensor.name}` is in both `{other}` and `{shard}`")
            tensors[tensor.name] = tensor
    return tensors


def _single(label: str, sizes: Mapping[str, int]) -> str:
    if SINGLE in sizes:
        return SINGLE
    if len(sizes) == 1:
        return next(iter(sizes))
    files = ", ".join(sorted(sizes)) or "none"
    raise BrokenCheckpointError(
        label,
        f"it has neither {SINGLE} nor {INDEX}; safetensors files found: {files}",
        "Several shards need an index: save the model again with `save_pretrained`.",
    )


def _bad_index(label: str, problem: str) -> BrokenCheckpointError:
    remedy = "The index does not match the shards: use an intact copy."
    return BrokenCheckpointError(f"{label}: {INDEX}", problem, remedy)


def _weight_map(label: str, index: bytes) -> dict[str, str]:
    try:
        document = read_json(index, MAX_TABLE_BYTES)
    except DocumentError as error:
        raise _bad_index(label, str(error)) from None
    except ValueError:
        raise _bad_index(label, "it is not JSON") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_index(label, "it has no `weight_map` from tensors to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            problem = f"it maps `{name}` to {shard!r}, which is not a plain .safetensors file name"
            raise _bad_index(label, problem)
    return weight_map


def _is_plain(shard: str) -> bool:
    """Whether it names a file directly in the folder, so that no path leads out of it."""
    is_name = PurePosixPath(shard).name == shard and "\\" not in shard and "\0" not in shard
    return is_name and not shard.startswith(".") and shard.endswith(".safetensors")


class Reader(Protocol):
    """Reads the tensors of one source. Threads may share it."""

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on."""


class TensorReader:
    """Reads the tensors of a checkpoint in a local folder; messages name it `label`."""

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
        """Read by the file's descriptor; a missing or short file is a `BrokenCheckpointError`."""
        descriptor = self._descriptors.get(tensor.shard) or self._open(tensor.shard)
        position = tensor.start + first_byte
        while into.nbytes:
            try:
                n_read = read_at(descriptor, into, position)
            except OSError as error:
                raise self._broken(tensor.shard, f"it cannot be read: {error.strerror}") from None
            if n_read == 0:
                raise self._broken(tensor.shard, f"it ends inside `{tensor.name}`")
            into, position = into[n_read:], position + n_read

    def _open(self, shard: str) -> int:
        with self._opening:
            if shard not in self._descriptors:
                try:
                    self._descriptors[shard] = open_binary(self._folder / shard, os.O_RDONLY)
                except OSError as error:
                    if error.errno in TOO_MANY_OPEN:  # nothing is wrong with it
                        raise
                    raise self._broken(shard, f"it cannot be read: {error.strerror}") from None
            return self._descriptors[shard]

    def _broken(self, shard: str, problem: str) -> BrokenCheckpointError:
        return BrokenCheckpointError(f"{self._label}: {shard}", problem, CHANGED)


def read_tensor(reader: Reader, tensor: TensorHeader) -> Tensor:
    """Read a whole tensor, in float32 if it is a float; imports torch.

    torch allocates the memory: on some processors the rounding of matrix products depends on how a
    matrix is aligned to cache lines.
    """
    import torch

    if tensor.dtype not in torch_dtypes():
        problem = f"`{tensor.name}` is {tensor.dtype}, which this version does not read"
        remedy = "Use a model in bfloat16, float16 or float32."
        raise BrokenCheckpointError(tensor.shard, problem, remedy)
    content = torch.empty(tensor.n_bytes, dtype=torch.uint8)
    reader.read(tensor, 0, content.numpy().data)
    return content.view(torch_dtypes()[tensor.dtype]).reshape(tensor.shape).float()
