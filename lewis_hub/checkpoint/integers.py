"""A checkpoint of compressed-tensors' integers, as one of float32: what belongs to which tensor.

Of 8 bits they lie as they are (``int-quantized``, ``naive-quantized``) or, of 4 and 8 bits, in
words of 32 (``pack-quantized``). Only headers are looked at.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from lewis_hub.checkpoint.codes import Codes, Scaled
from lewis_hub.checkpoint.eight_bit import OF_ACTIVATIONS, block_of
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

PACKED = "_packed"
PARTS = ("_scale", "_zero_point", "_g_idx", "_shape")  # after the weight's name
WORD = 32  # bits


def unpacked(checkpoint: Checkpoint, block: tuple[int, int], n_bits: int | None) -> Checkpoint:
    """The same checkpoint with its integers in float32, and without what belongs to them.

    Args:
        checkpoint: as its files hold it; its configuration says that it is of compressed-tensors.
        block: rows and columns that share a scale, where a scale is for none of row, group and
            tensor.
        n_bits: of packed integers, 4 or 8; None: none are packed.

    Raises:
        BrokenCheckpointError: a part does not fit its tensor.
    """
    tensors = checkpoint.tensors
    kept: dict[str, TensorHeader] = {}
    dropped: set[str] = set()
    for name, stored in tensors.items():
        if stored.dtype == "I8" and name + "_scale" in tensors:
            values, codes = stored, _codes(8)
        elif n_bits and stored.dtype == "I32" and name.endswith(PACKED):
            values, codes = _loosened(stored, n_bits), _codes(n_bits)
        else:
            kept[name] = stored
            continue
        made = replace(_scaled(checkpoint, values, codes, block), stored=stored)
        n_bytes = 4 * values.n_elements
        kept[values.name] = replace(values, dtype="F32", n_bytes=n_bytes, scaled=made)
        dropped |= {values.name + part for part in PARTS}
    if not dropped:
        return checkpoint
    dropped |= {name for name in tensors if name.endswith(OF_ACTIVATIONS)}
    left = {name: tensor for name, tensor in kept.items() if name not in dropped}
    return replace(checkpoint, tensors=left)


def _codes(n_bits: int) -> Codes:
    return "I4" if n_bits == 4 else "I8"


def _loosened(stored: TensorHeader, n_bits: int) -> TensorHeader:
    """What packed integers stand for: their columns always fill their words."""
    shape = (*stored.shape[:-1], stored.shape[-1] * WORD // n_bits)
    return replace(stored, name=stored.name.removesuffix(PACKED), shape=shape)


def _scaled(
    checkpoint: Checkpoint, values: TensorHeader, codes: Codes, block: tuple[int, int]
) -> Scaled:
    parts = {part: checkpoint.tensors.get(values.name + part) for part in PARTS}
    scale, zero, groups = parts["_scale"], parts["_zero_point"], parts["_g_idx"]
    if scale is None:
        raise _misfit(checkpoint, values, f"`{values.name}` has no scale beside it")
    shared = block_of(checkpoint.label, values, scale, block)
    if zero is not None and not _fits(zero, scale, values, codes):
        shape = f"`{zero.name}` is {zero.dtype} of shape {list(zero.shape)}"
        text = f"{shape}, which fits no scales of shape {list(scale.shape)}"
        raise _misfit(checkpoint, zero, text)
    if groups is not None and (groups.dtype != "I32" or groups.shape != values.shape[-1:]):
        text = f"`{groups.name}` is no I32 of {values.shape[-1]} columns"
        raise _misfit(checkpoint, groups, text)
    return Scaled(values, scale, shared, codes, zero, groups, parts["_shape"])


def _fits(zero: TensorHeader, scale: TensorHeader, values: TensorHeader, codes: Codes) -> bool:
    """Whether there is one zero a scale: as a code, or packed down the columns."""
    if zero.dtype == "I8":
        return zero.shape == scale.shape
    n_rows, n_across = values.shape[0], prod(scale.shape[1:])
    n_words = -(-n_rows * (4 if codes == "I4" else 8) // WORD)
    is_by_row = scale.shape[:1] == (n_rows,)
    return zero.dtype == "I32" and is_by_row and zero.shape == (n_words, n_across)


def _misfit(checkpoint: Checkpoint, tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)
