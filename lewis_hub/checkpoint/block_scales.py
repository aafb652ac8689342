"""Codes with block scales: 8-bit floats, and integers as compressed-tensors writes them.

A scale, and where there is one a zero, is shared by a tensor, a row, a group of columns of a row,
or a block of rows and columns; the shapes of tensor and scale tell which.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from lewis_hub.checkpoint.header import (
    MERGEABLE,
    Codes,
    FourBit,
    Scaled,
    TensorHeader,
    Transposed,
)
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

FP8 = "F8_E4M3"
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, unless a configuration names others
FP8_SCALES = ("_scale_inv", "_scale")  # follow the tensor's name; both are factors of the codes
ACTIVATION_SCALES = (  # used when the quantised model runs; they do not change its weights
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".input_zero_point",
    ".output_zero_point",
)
PACKED = "_packed"  # follows the name of the weight
INTEGER_PARTS = ("_scale", "_zero_point", "_g_idx", "_shape")  # follow the name of the weight
WORD_BITS = 32
UNQUANTISED = "Use the model that it was quantised from, in bfloat16, float16 or float32."


def misfit(checkpoint: Checkpoint, tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    """The error for a part of a quantised tensor that is missing or does not fit."""
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)


def describe(tensor: TensorHeader) -> str:
    """Name, dtype and shape, for messages."""
    return f"`{tensor.name}` is {tensor.dtype} of shape {list(tensor.shape)}"


def as_float32(
    stored: TensorHeader, name: str, shape: tuple[int, ...], scaled: Scaled | FourBit | Transposed
) -> TensorHeader:
    """The header of a quantised tensor as it is read."""
    values = replace(stored, name=name, dtype="F32", shape=shape, scaled=scaled)
    return replace(values, n_bytes=4 * values.n_elements)


def dequantise_fp8(checkpoint: Checkpoint, block: tuple[int, int] = FP8_BLOCK) -> Checkpoint:
    """Describe 8-bit floats that have a scale as float32, and drop the scales.

    Args:
        checkpoint: as its files store it.
        block: rows and columns that share a scale, if scales are not by row, group or tensor.

    Raises:
        BrokenCheckpointError: a scale does not fit its tensor.
    """
    tensors = checkpoint.tensors
    scales = {
        name: tensors[name + ending]
        for name, tensor in tensors.items()
        if tensor.dtype == FP8
        for ending in FP8_SCALES
        if name + ending in tensors
    }
    if not scales:
        return checkpoint
    dropped = {scale.name for scale in scales.values()}
    dropped |= {name for name in tensors if name.endswith(ACTIVATION_SCALES)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    for name, scale in scales.items():
        stored = tensors[name]
        scaled = Scaled(stored, scale, _block(checkpoint, stored, scale, block))
        kept[name] = as_float32(stored, name, stored.shape, scaled)
    return replace(checkpoint, tensors=kept)


def dequantise_integers(
    checkpoint: Checkpoint, block: tuple[int, int], n_bits: int | None
) -> Checkpoint:
    """Describe the integers of compressed-tensors as float32, and drop scales, zeros and orders.

    Args:
        checkpoint: as its files store it.
        block: rows and columns that share a scale, if scales are not by row, group or tensor.
        n_bits: of codes in 32-bit words, 4 or 8; None if no codes are packed.

    Raises:
        BrokenCheckpointError: a part does not fit its tensor.
    """
    tensors = checkpoint.tensors
    kept: dict[str, TensorHeader] = {}
    dropped: set[str] = set()
    for name, stored in tensors.items():
        codes: Codes = "I4" if n_bits == 4 else "I8"
        if stored.dtype == "I8" and name + "_scale" in tensors:
            values, codes = stored, "I8"
        elif n_bits and stored.dtype == "I32" and name.endswith(PACKED):
            shape = (*stored.shape[:-1], stored.shape[-1] * WORD_BITS // n_bits)
            values = replace(stored, name=name.removesuffix(PACKED), shape=shape)
        else:
            kept[name] = stored
            continue
        scaled = replace(_scaled(checkpoint, values, codes, block), stored=stored)
        kept[values.name] = as_float32(stored, values.name, values.shape, scaled)
        dropped |= {values.name + part for part in INTEGER_PARTS}
    if not dropped:
        return checkpoint
    dropped |= {name for name in tensors if name.endswith(ACTIVATION_SCALES)}
    left = {name: tensor for name, tensor in kept.items() if name not in dropped}
    return replace(checkpoint, tensors=left)


def _block(
    checkpoint: Checkpoint, stored: TensorHeader, scale: TensorHeader, block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes of the values and of the scale."""
    if scale.dtype not in MERGEABLE:
        where = f"{checkpoint.label}: {scale.shard}"
        problem = f"`{scale.name}` is {scale.dtype}, which is not read as a scale"
        raise BrokenCheckpointError(where, problem, UNQUANTISED)
    if scale.n_elements == 1:
        return max(1, stored.n_elements), max((1, *stored.shape[-1:]))
    if len(stored.shape) == 2:
        n_rows, n_columns = stored.shape
        if scale.shape in ((n_rows, 1), (n_rows,)):
            return 1, max(1, n_columns)
        if scale.shape == (-(-n_rows // block[0]), -(-n_columns // block[1])):
            return block
        n_groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == n_rows else 0
        if n_groups and n_columns % n_groups == 0:
            return 1, n_columns // n_groups
    raise misfit(
        checkpoint,
        scale,
        f"`{scale.name}` has shape {list(scale.shape)}, which fits {stored.name} of shape "
        f"{list(stored.shape)} neither by tensor, by row, by group, nor by blocks of {list(block)}",
    )


def _scaled(
    checkpoint: Checkpoint, values: TensorHeader, codes: Codes, block: tuple[int, int]
) -> Scaled:
    parts = {part: checkpoint.tensors.get(values.name + part) for part in INTEGER_PARTS}
    scale, zero, groups = parts["_scale"], parts["_zero_point"], parts["_g_idx"]
    if scale is None:
        raise misfit(checkpoint, values, f"`{values.name}` has no tensor of scales")
    shared = _block(checkpoint, values, scale, block)
    if zero is not None and not _is_zero_of(zero, scale, values, codes):
        problem = f"{describe(zero)}, which does not fit scales of shape {list(scale.shape)}"
        raise misfit(checkpoint, zero, problem)
    if groups is not None and (groups.dtype != "I32" or groups.shape != values.shape[-1:]):
        problem = f"{describe(groups)}, expected I32 of {values.shape[-1]} columns"
        raise misfit(checkpoint, groups, problem)
    return Scaled(values, scale, shared, codes, zero, groups, parts["_shape"])


def _is_zero_of(
    zero: TensorHeader, scale: TensorHeader, values: TensorHeader, codes: Codes
) -> bool:
    """Whether there is a zero for each scale: one code, or codes packed down the columns."""
    if zero.dtype == "I8":
        return zero.shape == scale.shape
    n_rows, n_across = values.shape[0], prod(scale.shape[1:])
    n_words = -(-n_rows * (4 if codes == "I4" else 8) // WORD_BITS)
    is_by_row = scale.shape[:1] == (n_rows,)
    return zero.dtype == "I32" and is_by_row and zero.shape == (n_words, n_across)
