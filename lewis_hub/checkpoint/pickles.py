"""Convert pickled weights (`pytorch_model.bin`) to safetensors, tensor by tensor; imports torch.

A pickle is a program. torch reads it with `weights_only=True`, which builds tensors and refuses to
call anything else.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from lewis_hub.display import Advance
from lewis_hub.errors import PickleError
from lewis_hub.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
UNSAFE = "Use the model as safetensors: ask its author, or convert it on a machine without secrets."
MOST_COPIES = 4  # of the bytes of the pickles: tensors may share memory
DAMAGED = "The file is damaged or was not written by torch: use an intact copy."


@dataclass(frozen=True)
class WrittenFile:
    """A file that `convert` wrote."""

    name: str
    sha256: str  # 64 hex digits
    n_bytes: int


def convert(
    label: str, pickles: Mapping[str, Path], output: Path, advance: Advance, *, ties: bool | None
) -> tuple[WrittenFile, ...]:
    """Write the tensors of a model's pickles as safetensors, one file for each pickle.

    Tensors that share memory are written once, as in `save_pretrained`: the embeddings rather than
    a head, otherwise the first. `pickles` are file within the source -> its path, in order; `ties`
    is `tie_word_embeddings` of the configuration, None if it is not set: True drops a head with the
    shape of the embeddings, False keeps a head that shares their memory.

    Raises:
        PickleError: a pickle contains more than tensors, is damaged, or contains no model.
        OutputError: the disk cannot hold the files.
    """
    loaded = {file: _load(f"{label}: {file}", path) for file, path in pickles.items()}
    tensors: dict[str, Tensor] = {}
    for file, state_dict in loaded.items():
        for name in state_dict.keys() & tensors.keys():
            raise PickleError(f"{label}: {file}", f"`{name}` is in another file too", DAMAGED)
        tensors |= state_dict
    dropped = _second_copies(tensors, ties=ties)
    layouts = [
        _layout(shard_name(i, len(loaded)), state_dict, dropped)
        for i, state_dict in enumerate(loaded.values())
    ]
    _require_stored(label, pickles, layouts)
    written = [_write(layout, tensors, output, advance) for layout in layouts]
    index = index_document(layouts)
    if index:
        path = output / INDEX
        path.write_text(index, encoding="utf-8", newline="\n")
        written.append(WrittenFile(INDEX, sha256_of(path), path.stat().st_size))
    return tuple(written)


def _load(where: str, path: Path) -> dict[str, Tensor]:
    """Load the tensors of one pickle; those of a zip file stay on disk until they are used."""
    import torch

    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _require_uncompressed(where, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        refused = REFUSED_GLOBAL.search(str(error))
        if not refused:
            raise PickleError(where, "it is not a pickle that torch wrote", DAMAGED) from None
        problem = f"it contains `{refused[1]}`, but only tensors are read from a pickle"
        raise PickleError(where, problem, UNSAFE) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        line = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise PickleError(where, f"torch cannot read it ({line})", DAMAGED) from None
    return dict(_tensors(where, loaded))


def _require_uncompressed(where: str, path: Path) -> None:
    """Refuse compressed entries, which torch does not write: a few MB could become gigabytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = {entry.compress_type for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise PickleError(where, f"it is a broken zip file ({error})", DAMAGED) from None
    if kinds != {zipfile.ZIP_STORED}:
        raise PickleError(where, "it is a compressed zip file", DAMAGED)


def _tensors(where: str, loaded: object) -> Iterator[tuple[str, Tensor]]:
    import torch

    if not isinstance(loaded, dict) or not loaded:
        kind = "an empty dict" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        problem = f"it contains {kind}, expected a dict from names to tensors"
        raise PickleError(where, problem, UNSAFE)
    for name, tensor in loaded.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        plain = plain and not (tensor.is_meta or tensor.is_nested)  # no content, no shape
        if not isinstance(name, str) or not name.isprintable() or not plain:
            problem = f"it contains {str(name)!r}, which is not a named dense tensor"
            raise PickleError(where, problem, UNSAFE)
        if tensor.is_quantized or tensor.dtype not in torch_dtypes().values():
            problem = f"it contains `{name}` as {tensor.dtype}, which is not read"
            raise PickleError(where, problem, "Use the model in bfloat16, float16 or float32.")
        yield name, tensor.detach()


def _second_copies(tensors: Mapping[str, Tensor], *, ties: bool | None) -> set[str]:
    """The names that `save_pretrained` would leave out."""
    first: dict[tuple[object, ...], str] = {}  # address, shape, strides and dtype -> a name
    dropped = set()
    # embeddings first, heads last: of a tied pair the embeddings are written
    for name in sorted(tensors, key=lambda n: (names.is_head(n), not names.is_input_side(n))):
        tensor = tensors[name]
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        kept = ties is False and names.is_head(name)
        if tensor.numel() and first.setdefault(storage, name) != name and not kept:
            dropped.add(name)
    if ties:
        shapes = {tuple(t.shape) for name, t in tensors.items() if names.is_input_side(name)}
        heads = filter(names.is_head, tensors)
        dropped |= {head for head in heads if tuple(tensors[head].shape) in shapes}
    return dropped


def _layout(file: str, state_dict: Mapping[str, Tensor], dropped: set[str]) -> ShardLayout:
    dtypes = {dtype: name for name, dtype in torch_dtypes().items()}
    outputs = [
        OutputTensor(name, dtypes[tensor.dtype], tuple(tensor.shape))
        for name, tensor in state_dict.items()
        if name not in dropped
    ]
    return ShardLayout(file, tuple(sorted(outputs, key=lambda tensor: -WIDTHS[tensor.dtype])))


def _require_stored(
    label: str, pickles: Mapping[str, Path], layouts: Sequence[ShardLayout]
) -> None:
    """Refuse tensors that repeat the same few bytes: a file of 2 KB could become gigabytes."""
    n_bytes = sum(layout.n_bytes for layout in layouts)
    stored_bytes = sum(path.stat().st_size for path in pickles.values())
    if n_bytes > MOST_COPIES * stored_bytes:
        problem = f"its tensors have {n_bytes:,} bytes, its pickles {stored_bytes:,}"
        raise PickleError(label, problem, DAMAGED)


def _write(
    layout: ShardLayout, tensors: Mapping[str, Tensor], output: Path, advance: Advance
) -> WrittenFile:
    import torch

    with ShardWriter(output, layout, stays_cached=True) as writer:  # the merge reads it next
        for output_tensor, start in zip(layout.tensors, layout.starts, strict=True):
            tensor = tensors[output_tensor.name].resolve_neg().contiguous()
            content = tensor.flatten().view(torch.uint8)
            writer.write(start, content.numpy().data)
            advance(output_tensor.n_bytes)
        return WrittenFile(layout.name, writer.finish(), layout.n_bytes)
