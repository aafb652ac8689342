"""Pickled weights (`pytorch_model.bin`) to safetensors, tensor by tensor; imports torch.

Pickles are programs. torch reads them here with `weights_only=True`, which builds tensors and
refuses to call anything else.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, torch_dtypes
from lewis_hub.checkpoint.reader import INDEX
from lewis_hub.checkpoint.writer import (
    OutputTensor,
    ShardLayout,
    ShardWriter,
    index_document,
    shard_name,
)
from lewis_hub.errors import PickleError
from lewis_hub.files import sha256_of
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    import torch
    from torch import Tensor


UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)")
FOREIGN = "Use it as safetensors: ask its author, or convert it where nothing else can be harmed."
DAMAGED = "The file is damaged or was not written by torch: use an intact copy."


@dataclass(frozen=True)
class WrittenFile:
    """A file that a pickle became."""

    name: str
    sha256: str  # 64 hex digits
    n_bytes: int


class _Place(NamedTuple):
    """Two tensors of one place are one tensor."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


def convert(
    label: str, pickles: Mapping[str, Path], output: Path, advance: Advance, *, ties: bool | None
) -> tuple[WrittenFile, ...]:
    """Write the tensors of a model's pickles as safetensors: one file for each.

    Tensors that share their memory are written once, as `save_pretrained` does: the embeddings
    rather than a head, otherwise the first.

    Args:
        label: the source, for messages.
        pickles: file within the source -> where it lies, in order.
        output: folder to write into.
        advance: called with bytes written.
        ties: `tie_word_embeddings` of its configuration; None where that is silent. True drops a
            head that fits the embeddings, False keeps one that shares their memory.

    Raises:
        PickleError: a pickle asks for more than tensors, is damaged, or holds no model.
        OutputError: there is not enough room.
    """
    loaded = {file: _load(f"{label}: {file}", path) for file, path in pickles.items()}
    tensors: dict[str, Tensor] = {}
    for file, found in loaded.items():
        for name in found.keys() & tensors.keys():
            raise PickleError(f"{label}: {file}", f"`{name}` is in another file too", DAMAGED)
        tensors |= found
    dropped = _second_copies(tensors, ties=ties)
    layouts = [
        ShardLayout(shard_name(i, len(loaded)), tuple(_planned(found, dropped)))
        for i, found in enumerate(loaded.values())
    ]
    written = [_write(layout, tensors, output, advance) for layout in layouts]
    index = index_document(layouts)
    if index:
        path = output / INDEX
        path.write_text(index, encoding="utf-8")
        written.append(WrittenFile(INDEX, sha256_of(path), path.stat().st_size))
    return tuple(written)


def _load(where: str, path: Path) -> dict[str, Tensor]:
    """The tensors of one pickle; those of a zip file stay on disk until they are read."""
    import torch

    lazily = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that others than torch wrote
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:
        asked = UNSUPPORTED.search(str(error))
        if not asked:
            raise PickleError(where, "it is no pickle that torch wrote", DAMAGED) from None
        problem = f"it asks for `{asked[1]}`, and nothing but tensors is read from a pickle"
        raise PickleError(where, problem, FOREIGN) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        line = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise PickleError(where, f"torch cannot read it ({line})", DAMAGED) from None
    return dict(_tensors(where, found))


def _tensors(where: str, found: Any) -> Iterator[tuple[str, Tensor]]:
    import torch

    if not isinstance(found, dict) or not found:
        problem = f"it holds a {type(found).__name__}, expected names and their tensors"
        raise PickleError(where, problem, FOREIGN)
    for name, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not name.isprintable() or not plain:
            problem = f"it holds {str(name)!r}, which is no plain tensor with a name"
            raise PickleError(where, problem, FOREIGN)
        if tensor.is_quantized or tensor.dtype not in _dtypes():
            problem = f"it holds `{name}` as {tensor.dtype}, which is not read"
            raise PickleError(where, problem, "Use the model in bfloat16, float16 or float32.")
        yield name, tensor.detach()


def _second_copies(tensors: Mapping[str, Tensor], *, ties: bool | None) -> set[str]:
    """The names that `save_pretrained` would leave out."""
    first: dict[_Place, str] = {}
    dropped = set()
    # the embeddings come first, a head last: what is written is what the head is tied to
    for name in sorted(tensors, key=lambda n: (names.is_head(n), not names.is_input_side(n))):
        tensor = tensors[name]
        place = _Place(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        kept = ties is False and names.is_head(name)
        if tensor.numel() and first.setdefault(place, name) != name and not kept:
            dropped.add(name)
    if ties:
        shapes = {tuple(t.shape) for name, t in tensors.items() if names.is_input_side(name)}
        heads = filter(names.is_head, tensors)
        dropped |= {head for head in heads if tuple(tensors[head].shape) in shapes}
    return dropped


def _planned(found: Mapping[str, Tensor], dropped: set[str]) -> list[OutputTensor]:
    planned = [
        OutputTensor(name, _dtypes()[tensor.dtype], tuple(tensor.shape))
        for name, tensor in found.items()
        if name not in dropped
    ]
    return sorted(planned, key=lambda tensor: -WIDTHS[tensor.dtype])


def _write(
    layout: ShardLayout, tensors: Mapping[str, Tensor], output: Path, advance: Advance
) -> WrittenFile:
    import torch

    with ShardWriter(output, layout, stays_cached=True) as writer:  # it is merged next
        for planned, start in zip(layout.tensors, layout.starts, strict=True):
            held = tensors[planned.name].contiguous().flatten().view(torch.uint8)
            writer.write(start, held.numpy().data)
            writer.complete(start, start + planned.n_bytes)
            advance(planned.n_bytes)
        return WrittenFile(layout.name, writer.finish(), layout.n_bytes)


def _dtypes() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in torch_dtypes().items()}
