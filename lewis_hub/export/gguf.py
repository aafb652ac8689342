"""Plan a GGUF file from headers and small files, and write it tensor by tensor.

A file has its fields first, then names, types, shapes and positions of the tensors, then their
values, each padded to 32 bytes. Norms and vectors are float32. Q8_0 stores blocks of 32 values of a
row as 8-bit integers with a float16 scale; a tensor with other rows is stored as float16.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, Reader
from lewis_hub.display import Advance
from lewis_hub.errors import ExportError, ExtraMissingError
from lewis_hub.export.architectures import (
    EMBEDDINGS,
    ExportTensor,
    Rules,
    export_tensors,
    rules_for,
)
from lewis_hub.export.hyperparameters import (
    UNREADABLE,
    add_hyperparameters,
    complete_config,
    require_expressible,
    rope_tensors,
)
from lewis_hub.export.vocabulary import GgufVocabulary, read_gguf_vocabulary
from lewis_hub.files import unwritable
from lewis_hub.recipe.formats import ExportFormat, file_type

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    Floats = np.ndarray[Any, np.dtype[np.float32]]

CHUNK = 1 << 18  # elements that are converted at a time, if a row is not longer
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
STEPS = 127  # of q8_0, times a scale in float16
LOSSLESS = "Export it as `gguf:bf16`."


@dataclass(frozen=True)
class GgufPlan:
    """All of a GGUF file but the values of its tensors."""

    label: str  # the model, for messages
    rules: Rules
    config: Mapping[str, Any]  # with transformers' defaults
    vocabulary: GgufVocabulary
    tensors: tuple[ExportTensor, ...]


def plan_gguf(
    checkpoint: Checkpoint, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> GgufPlan:
    """Plan the file of a model; no weights are read.

    Args:
        checkpoint: the headers of the model.
        config: its `config.json`.
        files: the content of those of `vocabulary.FILES` that it has.

    Raises:
        ExportError: llama.cpp, or the rules here, have no equivalent for a part of the model.
        ExtraMissingError: the package `gguf` is not installed.
        SourceError: as `require_buildable`.
    """
    label = checkpoint.label
    rules = rules_for(label, config)
    if find_spec("gguf") is None:
        raise ExtraMissingError("Export to GGUF", "gguf")
    require_buildable(label, config, len(checkpoint.tensors))
    whole = complete_config(label, config)
    try:
        require_expressible(label, rules, whole)
        tensors = export_tensors(checkpoint, rules, whole)
        n_rows = checkpoint.tensors[EMBEDDINGS].shape[0]
        vocabulary = read_gguf_vocabulary(label, files, n_rows, whole)
        whole["vocab_size"] = n_rows
        plan = GgufPlan(label, rules, whole, vocabulary, (*tensors, *rope_tensors(whole)))
        _header(plan, "gguf:f16", Path(os.devnull))  # so that it can be written later
    except UNREADABLE as error:
        problem = f"a part of its files has no place in the format ({error})"
        raise ExportError(label, problem, "Use an intact copy of the model.") from None
    return plan


def gguf_bytes(plan: GgufPlan, export: ExportFormat) -> int:
    """Return the bytes of all tensors."""
    return sum(_n_bytes(tensor.shape, _type_of(tensor, export)) for tensor in plan.tensors)


def write_gguf(
    plan: GgufPlan, export: ExportFormat, reader: Reader, path: Path, advance: Advance
) -> str:
    """Write the file; return its sha256.

    Args:
        plan: from `plan_gguf`.
        export: the type of its matrices.
        reader: of the model's checkpoint.
        path: the file; after an error it is incomplete.
        advance: called with the bytes of tensors that are written.

    Raises:
        ExportError: a value does not fit float16.
        OutputError: the disk is full or failing.
    """
    try:
        writer = _header(plan, export, path)
        digest = hashlib.sha256()
        with path.open("r+b") as file:
            while block := file.read(1 << 20):
                digest.update(block)

            def put(content: bytes | memoryview) -> None:
                file.write(content)
                digest.update(content)

            alignment = writer.data_alignment
            put(bytes(-file.tell() % alignment))
            for tensor in plan.tensors:
                for rows in _rows(plan.label, tensor, reader):
                    stored = _stored(plan.label, tensor, rows, _type_of(tensor, export))
                    put(stored)
                    advance(len(stored))
                put(bytes(-file.tell() % alignment))
    except OSError as error:
        raise unwritable(path, error) from None
    return digest.hexdigest()


def _header(plan: GgufPlan, export: ExportFormat, path: Path) -> GGUFWriter:
    """Write all before the values."""
    import gguf

    writer = gguf.GGUFWriter(None, plan.rules.name)
    writer.add_type(gguf.GGUFType.MODEL)
    add_hyperparameters(writer, plan.rules, plan.config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type(export)}"])
    plan.vocabulary.add_to(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in plan.tensors:
        kind = _type_of(tensor, export)
        n_bytes = _n_bytes(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, kind)
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    return writer


def _type_of(tensor: ExportTensor, export: ExportFormat) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(tensor.shape) == 1 or tensor.name.endswith("_norm.weight"):
        return types.F32
    asked = types[file_type(export)]
    return types.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[asked][0] else asked


def _n_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    import gguf

    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return prod(shape) // int(n_values) * int(n_bytes)


def _rows(label: str, tensor: ExportTensor, reader: Reader) -> Iterator[Floats]:
    """Yield the float32 values of a tensor in pieces of whole rows, and of whole heads."""
    source = tensor.source
    if source is None:
        yield np.array(tensor.values, dtype=np.float32)
        return
    n_rows, width = source.shape[0], source.n_elements // max(source.shape[0], 1)
    group = n_rows // tensor.n_heads if tensor.n_heads else 1
    step = max(CHUNK // max(width * group, 1), 1) * group
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        rows = _read(source, reader, first * width, last * width)
        if tensor.n_heads:
            halves = rows.reshape(-1, 2, group // 2, width)
            rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)
        if tensor.shift:
            rows = rows + np.float32(tensor.shift)
        if not np.isfinite(rows).all():
            problem = f"`{source.name}` holds NaN or infinity"
            raise ExportError(label, problem, "Use an intact copy of the model.")
        yield rows.reshape(last - first, *source.shape[1:])


def _read(source: TensorHeader, reader: Reader, first: int, last: int) -> Floats:
    """Read elements of a tensor as float32."""
    width = source.n_bytes // source.n_elements
    content = bytearray((last - first) * width)
    reader.read(source, first * width, memoryview(content))
    if source.dtype == "BF16":
        bits = np.frombuffer(content, "<u2").astype("<u4") << 16
        return bits.view(np.float32)
    return np.frombuffer(content, DTYPES[source.dtype]).astype(np.float32)


def _stored(
    label: str, tensor: ExportTensor, rows: Floats, kind: GGMLQuantizationType
) -> memoryview:
    """Return the bytes of rows in a type of ggml."""
    import gguf

    with np.errstate(over="ignore"):
        found = gguf.quants.quantize(rows, kind)
        largest = np.abs(rows).max(initial=0.0)
        steps = {gguf.GGMLQuantizationType.F16: 1, gguf.GGMLQuantizationType.Q8_0: STEPS}.get(kind)
        too_large = steps is not None and np.isinf(np.float16(largest / steps))
    if too_large:
        name, end = ("float16", "65504") if steps == 1 else ("q8_0", f"{STEPS * 65504:,}")
        problem = f"`{tensor.name}` holds {largest:g}, and {name} ends at {end}"
        raise ExportError(label, problem, LOSSLESS)
    return np.ascontiguousarray(found).data.cast("B")
