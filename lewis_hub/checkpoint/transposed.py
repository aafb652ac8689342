"""A checkpoint of GPTQ, AWQ or MXFP4, as one of float32: what belongs to which tensor.

All three store matrices by columns of what they are read as. Only headers are looked at.
"""

from __future__ import annotations

from dataclasses import replace

from lewis_hub.checkpoint.codes import Layout, Transposed
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

WEIGHT, PARTS = "qweight", ("scales", "qzeros", "g_idx")  # of GPTQ and AWQ: after the module's name
BLOCKS, SCALES = "_blocks", "_scales"  # of MXFP4: after the tensor's name
WORD = 32  # bits
BLOCK = 32  # values of MXFP4 that share a scale, in 16 bytes
BITS = (4, 8)  # of a code in words


def turned(checkpoint: Checkpoint, layout: Layout, n_bits: int, offset: int = 0) -> Checkpoint:
    """The same checkpoint with its codes in float32, and without what belongs to them.

    Args:
        checkpoint: as its files hold it; its configuration says how it was quantised.
        layout: how the codes lie.
        n_bits: of a code; of GPTQ where nothing in the file tells it.
        offset: of zeros, which are stored less this.

    Raises:
        BrokenCheckpointError: a part is missing, or does not fit its codes.
    """
    ending = BLOCKS if layout == "MXFP4" else f".{WEIGHT}"
    tensors = checkpoint.tensors
    made, dropped = dict(tensors), set()
    for name, stored in tensors.items():
        if not name.endswith(ending):
            continue
        if layout == "MXFP4":
            found, parts = _of_blocks(checkpoint, stored), {name.removesuffix(BLOCKS) + SCALES}
        else:
            found = _of_words(checkpoint, stored, layout, n_bits, offset)
            parts = {name.removesuffix(WEIGHT) + part for part in PARTS}
        made[name] = found
        dropped |= parts
    kept = (tensor for name, tensor in made.items() if name not in dropped)
    return replace(checkpoint, tensors={tensor.name: tensor for tensor in kept})


def _of_blocks(checkpoint: Checkpoint, stored: TensorHeader) -> TensorHeader:
    """Of MXFP4: codes (n, rows, blocks, 16) become n matrices of (32 * blocks, rows)."""
    name = stored.name.removesuffix(BLOCKS)
    scale = checkpoint.tensors.get(name + SCALES)
    fits = stored.dtype == "U8" and len(stored.shape) == 4 and stored.shape[-1] == BLOCK // 2
    if not fits:
        text = (
            f"{_said(stored)}, where U8 of four dimensions, the last of {BLOCK // 2}, is expected"
        )
        raise _misfit(checkpoint, stored, text)
    if scale is None or (scale.dtype, scale.shape) != ("U8", stored.shape[:-1]):
        raise _misfit(checkpoint, stored, _unfit(scale, f"`{name}{SCALES}`", stored))
    n, n_columns, n_blocks, _ = stored.shape
    code = Transposed(stored, "MXFP4", "MXFP4", scale)
    return _as_floats(stored, name, (n, n_blocks * BLOCK, n_columns), code)


def _of_words(
    checkpoint: Checkpoint, stored: TensorHeader, layout: Layout, n_bits: int, offset: int
) -> TensorHeader:
    """Of GPTQ, codes (columns in words, rows); of AWQ (columns, rows in words)."""
    module = stored.name.removesuffix(WEIGHT)
    scale, zero, groups = (checkpoint.tensors.get(module + part) for part in PARTS)
    if stored.dtype != "I32" or len(stored.shape) != 2:
        raise _misfit(
            checkpoint, stored, f"{_said(stored)}, where I32 of two dimensions is expected"
        )
    n_down, n_across = stored.shape
    if layout == "AWQ":
        n_rows, n_columns = n_across * WORD // n_bits, n_down
    else:
        told = (b for b in BITS if groups and groups.shape == (n_down * WORD // b,))
        n_bits = next(told, n_bits)
        n_rows, n_columns = n_across, n_down * WORD // n_bits
    if scale is None or scale.dtype not in MERGEABLE or scale.shape[1:] != (n_rows,):
        raise _misfit(checkpoint, stored, _unfit(scale, f"`{module}scales`", stored))
    n_groups = scale.shape[0]
    zeros = ("I32", (n_groups, n_rows * n_bits // WORD))
    if zero is None or (zero.dtype, zero.shape) != zeros or n_rows * n_bits % WORD:
        raise _misfit(checkpoint, stored, _unfit(zero, f"`{module}qzeros`", scale))
    if groups and (groups.dtype, groups.shape) != ("I32", (n_columns,)):
        raise _misfit(checkpoint, stored, _unfit(groups, f"`{module}g_idx`", stored))
    if not n_groups or (not groups and n_columns % n_groups):
        text = f"{_said(scale)}, which are no equal groups of {n_columns} columns"
        raise _misfit(checkpoint, stored, text)
    code = Transposed(stored, "I4" if n_bits == 4 else "I8", layout, scale, zero, offset, groups)
    return _as_floats(stored, f"{module}weight", (n_rows, n_columns), code)


def _as_floats(
    stored: TensorHeader, name: str, shape: tuple[int, ...], code: Transposed
) -> TensorHeader:
    read = replace(stored, name=name, dtype="F32", shape=shape, scaled=code)
    return replace(read, n_bytes=4 * read.n_elements)


def _said(tensor: TensorHeader) -> str:
    return f"`{tensor.name}` is {tensor.dtype} of shape {list(tensor.shape)}"


def _unfit(found: TensorHeader | None, wanted: str, other: TensorHeader) -> str:
    beside = f"{other.name} of shape {list(other.shape)}"
    return f"{_said(found)}, which does not fit {beside}" if found else f"there is no {wanted}"


def _misfit(checkpoint: Checkpoint, tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)
