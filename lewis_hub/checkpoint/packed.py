"""Matrices that GPTQ, AWQ and MXFP4 pack along their columns."""

from __future__ import annotations

from dataclasses import replace

from lewis_hub.checkpoint.block_scales import WORD_BITS, as_float32, describe, misfit
from lewis_hub.checkpoint.header import MERGEABLE, Layout, TensorHeader, Transposed
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

CODES, WORD_PARTS = "qweight", ("scales", "qzeros", "g_idx")  # GPTQ and AWQ: after the module
WORD_CODE_BITS = (4, 8)
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"  # MXFP4: follow the name of the tensor
BLOCK_VALUES = 32  # of MXFP4 share a scale
BLOCK_BYTES = BLOCK_VALUES // 2


def dequantise_packed(
    checkpoint: Checkpoint, layout: Layout, n_bits: int, offset: int = 0
) -> Checkpoint:
    """Describe packed matrices as float32, and drop scales, zeros and orders.

    Args:
        checkpoint: as its files store it.
        layout: how the codes are packed.
        n_bits: of a code; GPTQ uses it where no shape in the file tells it.
        offset: what the stored zeros are reduced by.

    Raises:
        BrokenCheckpointError: a part is missing, or does not fit its codes.
    """
    values: dict[str, TensorHeader] = dict(checkpoint.tensors)
    dropped: set[str] = set()
    for name, stored in checkpoint.tensors.items():
        if layout == "MXFP4" and name.endswith(BLOCKS):
            values[name] = _from_blocks(checkpoint, stored)
            dropped.add(name.removesuffix(BLOCKS) + BLOCK_SCALES)
        elif layout != "MXFP4" and name.endswith(f".{CODES}"):
            values[name] = _from_words(checkpoint, stored, layout, n_bits, offset)
            dropped |= {name.removesuffix(CODES) + part for part in WORD_PARTS}
    kept = (tensor for name, tensor in values.items() if name not in dropped)
    return replace(checkpoint, tensors={tensor.name: tensor for tensor in kept})


def _from_blocks(checkpoint: Checkpoint, stored: TensorHeader) -> TensorHeader:
    """MXFP4: codes (n, columns, blocks, 16) are n matrices of (32 * blocks, columns)."""
    name = stored.name.removesuffix(BLOCKS)
    scale = checkpoint.tensors.get(name + BLOCK_SCALES)
    if stored.dtype != "U8" or len(stored.shape) != 4 or stored.shape[-1] != BLOCK_BYTES:
        expected = f"U8 of four dimensions, the last of {BLOCK_BYTES}"
        raise misfit(checkpoint, stored, f"{describe(stored)}, expected {expected}")
    if scale is None or (scale.dtype, scale.shape) != ("U8", stored.shape[:-1]):
        raise _part_misfit(checkpoint, scale, name + BLOCK_SCALES, stored)
    n, n_columns, n_blocks, _ = stored.shape
    code = Transposed(stored, "MXFP4", "MXFP4", scale)
    return as_float32(stored, name, (n, n_blocks * BLOCK_VALUES, n_columns), code)


def _from_words(
    checkpoint: Checkpoint, stored: TensorHeader, layout: Layout, n_bits: int, offset: int
) -> TensorHeader:
    """GPTQ packs codes as (columns in words, rows), AWQ as (columns, rows in words)."""
    module = stored.name.removesuffix(CODES)
    scale, zero, groups = (checkpoint.tensors.get(module + part) for part in WORD_PARTS)
    if stored.dtype != "I32" or len(stored.shape) != 2:
        problem = f"{describe(stored)}, expected I32 of two dimensions"
        raise misfit(checkpoint, stored, problem)
    n_down, n_across = stored.shape
    if layout == "AWQ":
        n_rows, n_columns = n_across * WORD_BITS // n_bits, n_down
    else:
        fitting = (
            b for b in WORD_CODE_BITS if groups and groups.shape == (n_down * WORD_BITS // b,)
        )
        n_bits = next(fitting, n_bits)
        n_rows, n_columns = n_across, n_down * WORD_BITS // n_bits
    if scale is None or scale.dtype not in MERGEABLE or scale.shape[1:] != (n_rows,):
        raise _part_misfit(checkpoint, scale, f"{module}scales", stored)
    n_groups = scale.shape[0]
    zeros = ("I32", (n_groups, n_rows * n_bits // WORD_BITS))
    if zero is None or (zero.dtype, zero.shape) != zeros or n_rows * n_bits % WORD_BITS:
        raise _part_misfit(checkpoint, zero, f"{module}qzeros", scale)
    if groups and (groups.dtype, groups.shape) != ("I32", (n_columns,)):
        raise _part_misfit(checkpoint, groups, f"{module}g_idx", stored)
    if not n_groups or (not groups and n_columns % n_groups):
        problem = f"{describe(scale)}, which does not divide {n_columns} columns into equal groups"
        raise misfit(checkpoint, stored, problem)
    code = Transposed(stored, "I4" if n_bits == 4 else "I8", layout, scale, zero, offset, groups)
    return as_float32(stored, f"{module}weight", (n_rows, n_columns), code)


def _part_misfit(
    checkpoint: Checkpoint, part: TensorHeader | None, name: str, other: TensorHeader
) -> BrokenCheckpointError:
    if part is None:
        return misfit(checkpoint, other, f"`{name}` is missing")
    problem = f"{describe(part)}, which does not fit {other.name} of shape {list(other.shape)}"
    return misfit(checkpoint, other, problem)
