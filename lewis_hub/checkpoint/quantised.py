"""The tensors of quantised models as float32.

This version reads 8-bit floats (F8_E4M3) with scales, as DeepSeek, Qwen, Mistral, AutoFP8, FBGEMM,
ModelOpt and compressed-tensors write them; integers of compressed-tensors; 4 and 8 bits of
bitsandbytes; GPTQ of 4 and 8 bits, AWQ (gemm), and MXFP4 of gpt-oss. It refuses any other by name.

Only headers are read, and the descriptions that bitsandbytes stores in small tensors. A scale, and
a zero if there is any, belongs to a tensor, a row, a group of columns of a row, or a block of rows
and columns; the shapes of tensor and scale show which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any, Literal, TypeGuard

from lewis_hub.checkpoint.header import (
    COPIED,
    MAX_DIMENSIONS,
    MERGEABLE,
    Codes,
    FourBit,
    Layout,
    Nested,
    Scaled,
    TensorHeader,
    Transposed,
)
from lewis_hub.checkpoint.quantisation import PACKED_BITS, Quantisation
from lewis_hub.checkpoint.reader import N_REQUESTS, Checkpoint
from lewis_hub.documents import read_json
from lewis_hub.errors import BrokenCheckpointError

INTACT = "Use an intact copy, or the model that it was quantised from."
ReadTensor = Callable[[TensorHeader], bytes]
WRITERS = {  # endings of names that only a quantised model has, by who writes them
    "GPTQ and AWQ": (".qweight", ".qzeros"),
    "bitsandbytes": (".absmax", ".quant_map", ".SCB"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point"),
    "ModelOpt": (".weight_scale_2", ".pre_quant_scale"),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "quanto": ("._data",),
    "torchao": ("_qdata",),
    "gpt-oss (MXFP4)": ("_blocks",),
}
WORD_BITS = 32
ACTIVATION_SCALES = (  # used when the quantised model runs; they do not change its weights
    *(".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".input_zero_point", ".output_zero_point"),
)

FP8_SCALES = ("_scale", "_scale_inv")  # follow the tensor's name; both are factors of the codes

PACKED = "_packed"  # compressed-tensors: follows the name of the weight, as do its parts
INTEGER_PARTS = ("_scale", "_zero_point", "_g_idx", "_shape")

STATES: Mapping[str, Literal["NF4", "FP4"]] = {  # bitsandbytes: follow the name of the weight
    ".quant_state.bitsandbytes__nf4": "NF4",
    ".quant_state.bitsandbytes__fp4": "FP4",
}
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES)
ROW_PARTS = ("SCB", "weight_format")  # scales and layout of its 8 bits: in place of `weight`
BY_ROWS = b"\0"  # before version 0.45, matrices that were used were stored in tiles
NESTED = ("nested_blocksize", "nested_offset")
MAX_STATE_BYTES = 1 << 16
MAX_OFFSET = 3.0e38  # float32 has no larger numbers

CODES, WORD_PARTS = "qweight", ("scales", "qzeros", "g_idx")  # GPTQ and AWQ: after the module

BLOCKS, BLOCK_SCALES = "_blocks", "_scales"  # MXFP4: follow the name of the tensor
BLOCK_VALUES = 32  # of MXFP4 share a scale
BLOCK_BYTES = BLOCK_VALUES // 2


def dequantise(
    checkpoint: Checkpoint, quantisation: Quantisation | None, read: ReadTensor
) -> Checkpoint:
    """Describe the quantised tensors of a checkpoint as float32, and drop their scales.

    Values are computed when they are read. 8-bit floats and bitsandbytes are recognised by the
    tensors themselves, all else needs the configuration. Several threads `read` small tensors. A
    BrokenCheckpointError says that a scale or another part is missing, or does not fit its tensor.
    """
    how = quantisation or Quantisation("none", is_read=True)
    checkpoint = _bitsandbytes(_fp8(checkpoint, how.block), read)
    if how.layout:
        return _packed(checkpoint, how.layout, how)
    return _integers(checkpoint, how) if how.integers else checkpoint


def quantised_tensor(checkpoint: Checkpoint) -> str | None:
    """Find a tensor that only a quantised model has, and who writes such tensors; None: no such."""
    for name, tensor in checkpoint.tensors.items():
        writer = next((who for who, endings in WRITERS.items() if name.endswith(endings)), None)
        if writer:
            return f"{name}, as in {writer}"
        is_matrix = name.endswith(".weight") and len(tensor.shape) > 1
        if is_matrix and tensor.dtype in COPIED:
            return f"{name} as {tensor.dtype}"
    return None


def _fp8(checkpoint: Checkpoint, block: tuple[int, int]) -> Checkpoint:
    """Describe 8-bit floats that have a scale as float32, and drop the scales."""
    tensors, values = checkpoint.tensors, {}
    dropped = {name for name in tensors if name.endswith(ACTIVATION_SCALES)}
    for name, stored in tensors.items():
        for scale in (tensors.get(name + ending) for ending in FP8_SCALES):
            if scale and stored.dtype == "F8_E4M3":
                scaled = Scaled(stored, scale, _block(checkpoint, stored, scale, block))
                values[name] = _as_float32(name, stored.shape, scaled)
                dropped.add(scale.name)
    return _replaced(checkpoint, values, dropped)


def _integers(checkpoint: Checkpoint, how: Quantisation) -> Checkpoint:
    """Describe the integers of compressed-tensors as float32, and drop scales, zeros and orders."""
    n_bits = how.n_packed_bits
    tensors, values = checkpoint.tensors, {}
    dropped = {name for name in tensors if name.endswith(ACTIVATION_SCALES)}
    for name, stored in tensors.items():
        codes: Codes = "I4" if n_bits == 4 else "I8"
        if stored.dtype == "I8" and name + "_scale" in tensors:
            weight, codes = stored, "I8"
        elif n_bits and stored.dtype == "I32" and name.endswith(PACKED) and stored.shape:
            shape = (*stored.shape[:-1], stored.shape[-1] * WORD_BITS // n_bits)
            weight = replace(stored, name=name.removesuffix(PACKED), shape=shape)
        else:
            continue
        scaled = replace(_scaled(checkpoint, weight, codes, how.block), stored=stored)
        values[name] = _as_float32(weight.name, weight.shape, scaled)
        dropped |= {weight.name + part for part in INTEGER_PARTS}
    return _replaced(checkpoint, values, dropped)


def _bitsandbytes(checkpoint: Checkpoint, read: ReadTensor) -> Checkpoint:
    """Describe the 4 and 8 bits of bitsandbytes as float32, and drop the tensors beside them.

    4 bits are a packed weight, a table of 16 values, a scale for every block of elements, and a
    JSON document in a tensor of bytes. 8 bits are a weight in 127ths and a scale for every row.
    """
    tensors, values, dropped = checkpoint.tensors, {}, set()
    states = {name: ending for name in tensors for ending in STATES if name.endswith(ending)}
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        documents = pool.map(lambda name: _state(checkpoint, tensors[name], read), states)
    for (name, ending), state in zip(states.items(), documents, strict=True):
        weight = name.removesuffix(ending)
        stored = _part(checkpoint, weight, tensors[name])
        values[weight] = _four_bit(checkpoint, stored, STATES[ending], state)
        dropped |= {weight + part for part in FOUR_BIT_PARTS}
    values |= _eight_bit(checkpoint, read)
    dropped |= {name.removesuffix("weight") + part for name in values for part in ROW_PARTS}
    return _replaced(checkpoint, values, dropped)


def _eight_bit(checkpoint: Checkpoint, read: ReadTensor) -> Mapping[str, TensorHeader]:
    tensors, values, formats = checkpoint.tensors, {}, []
    for name, stored in tensors.items():
        scale, form = (tensors.get(name.removesuffix("weight") + part) for part in ROW_PARTS)
        if scale and stored.dtype == "I8" and name.endswith(".weight"):
            if (scale.dtype, scale.shape, 2) != ("F32", stored.shape[:1], len(stored.shape)):
                raise _unfit(checkpoint, scale, stored)
            scaled = Scaled(stored, scale, (1, max(1, stored.shape[1])), "INT8")
            values[name] = _as_float32(name, stored.shape, scaled)
            formats += [form] if form else []
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        by_rows = pool.map(lambda form: form.n_bytes == 1 and read(form) == BY_ROWS, formats)
    for form, is_by_rows in zip(formats, by_rows, strict=True):
        if not is_by_rows:
            problem = f"`{form.name}` says that its matrix is stored in tiles, not in rows"
            remedy = "Load it in the version of bitsandbytes that wrote it, and save it again; or "
            remedy += "use the model that it was quantised from."
            raise _misfit(checkpoint, form, problem, remedy)
    return values


def _packed(checkpoint: Checkpoint, layout: Layout, how: Quantisation) -> Checkpoint:
    """Describe matrices that are packed along their columns as float32, and drop their parts."""
    values, dropped = {}, set()
    for name, stored in checkpoint.tensors.items():
        if layout == "MXFP4" and name.endswith(BLOCKS):
            values[name] = _from_blocks(checkpoint, stored)
            dropped.add(name.removesuffix(BLOCKS) + BLOCK_SCALES)
        elif layout != "MXFP4" and name.endswith(f".{CODES}"):
            values[name] = _from_words(checkpoint, stored, layout, how)
            dropped |= {name.removesuffix(CODES) + part for part in WORD_PARTS}
    return _replaced(checkpoint, values, dropped)


def _replaced(
    checkpoint: Checkpoint, values: Mapping[str, TensorHeader], dropped: set[str]
) -> Checkpoint:
    """The checkpoint with `values` in place of the stored tensors of these names."""
    if not values:
        return checkpoint
    stored = checkpoint.tensors.items()
    kept = (values.get(name, tensor) for name, tensor in stored if name not in dropped)
    return replace(checkpoint, tensors={tensor.name: tensor for tensor in kept})


def _as_float32(
    name: str, shape: tuple[int, ...], scaled: Scaled | FourBit | Transposed
) -> TensorHeader:
    return replace(
        scaled.stored, name=name, dtype="F32", shape=shape, n_bytes=4 * prod(shape), scaled=scaled
    )


def _block(
    checkpoint: Checkpoint, stored: TensorHeader, scale: TensorHeader, block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes of the values and of the scale."""
    if scale.dtype not in MERGEABLE:
        problem = f"`{scale.name}` is {scale.dtype}, which is not read as a scale"
        remedy = "Use the model that it was quantised from, in bfloat16, float16 or float32."
        raise _misfit(checkpoint, scale, problem, remedy)
    if scale.n_elements == 1:
        return max(1, stored.n_elements), max((1, *stored.shape[-1:]))
    if len(stored.shape) == 2:
        n_rows, n_columns = stored.shape
        if scale.shape in ((n_rows, 1), (n_rows,)):
            return 1, max(1, n_columns)
        if scale.shape == (-(-n_rows // block[0]), -(-n_columns // block[1])):
            return min(block[0], max(1, n_rows)), min(block[1], max(1, n_columns))
        n_groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == n_rows else 0
        if n_groups and n_columns % n_groups == 0:
            return 1, n_columns // n_groups
    raise _misfit(
        checkpoint,
        scale,
        f"`{scale.name}` has shape {list(scale.shape)}, which fits {stored.name} of shape "
        f"{list(stored.shape)} neither by tensor, by row, by group, nor by blocks of {list(block)}",
    )


def _scaled(
    checkpoint: Checkpoint, weight: TensorHeader, codes: Codes, block: tuple[int, int]
) -> Scaled:
    parts = {part: checkpoint.tensors.get(weight.name + part) for part in INTEGER_PARTS}
    scale, zero, groups = parts["_scale"], parts["_zero_point"], parts["_g_idx"]
    if scale is None:
        raise _misfit(checkpoint, weight, f"`{weight.name}` has no tensor of scales")
    shared = _block(checkpoint, weight, scale, block)
    if zero is not None and not _is_zero_of(zero, scale, weight.shape[:1], codes):
        raise _unfit(checkpoint, zero, scale)
    if groups is not None and not _is_order_of(groups, weight):
        columns = f"{weight.shape[-1]} columns" if weight.shape else "columns, and there are none"
        problem = f"{_describe(groups)}, expected I32 of {columns}"
        raise _misfit(checkpoint, groups, problem)
    measure = parts["_shape"]
    if measure and (measure.dtype not in ("I32", "I64") or measure.shape != (len(weight.shape),)):
        raise _unfit(checkpoint, measure, weight)
    return Scaled(weight, scale, shared, codes, zero, groups, measure)


def _is_order_of(groups: TensorHeader, weight: TensorHeader) -> bool:
    """Whether there is a group for each column."""
    return groups.dtype == "I32" and len(groups.shape) == 1 and groups.shape == weight.shape[-1:]


def _is_zero_of(
    zero: TensorHeader, scale: TensorHeader, n_rows: tuple[int, ...], codes: Codes
) -> bool:
    """Whether there is a zero for each scale: one code, or codes packed down the columns."""
    if zero.dtype == "I8":
        return zero.shape == scale.shape
    n_words = -(-sum(n_rows) * (4 if codes == "I4" else 8) // WORD_BITS)
    is_by_row = n_rows != () and scale.shape[:1] == n_rows
    return zero.dtype == "I32" and is_by_row and zero.shape == (n_words, prod(scale.shape[1:]))


def _state(checkpoint: Checkpoint, tensor: TensorHeader, read: ReadTensor) -> Mapping[str, Any]:
    name = tensor.name
    if tensor.n_bytes > MAX_STATE_BYTES:
        problem = f"`{name}` has {tensor.n_bytes:,} bytes; at most {MAX_STATE_BYTES:,} are read"
        raise _misfit(checkpoint, tensor, problem)
    try:
        state: dict[str, Any] = read_json(read(tensor))
    except ValueError:
        raise _misfit(checkpoint, tensor, f"`{name}` is not JSON") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    sizes = [*shape, state.get("blocksize")] if isinstance(shape, list) else [None]
    if len(sizes) > MAX_DIMENSIONS or not all(type(n) is int and n > 0 for n in sizes):
        raise _misfit(checkpoint, tensor, f"`{name}` has no `shape` and `blocksize`")
    nested = {key: state.get(key) for key in NESTED}  # all states are kept, their other parts not
    numbers = {key: n for key, n in nested.items() if isinstance(n, (int, float))}
    return {"shape": shape, "blocksize": state["blocksize"], **numbers}


def _four_bit(
    checkpoint: Checkpoint,
    stored: TensorHeader,
    codes: Literal["NF4", "FP4"],
    state: Mapping[str, Any],
) -> TensorHeader:
    def part(ending: str, dtype: str, n_elements: int) -> TensorHeader:
        tensor = _part(checkpoint, name + ending, stored)
        if (tensor.dtype, tensor.n_elements) != (dtype, n_elements):
            problem = f"`{tensor.name}` is {tensor.dtype} of {tensor.n_elements} elements, expected"
            raise _misfit(checkpoint, tensor, f"{problem} {dtype} of {n_elements}")
        return tensor

    name = stored.name
    shape, n_elements = tuple(state["shape"]), prod(state["shape"])
    n_a_block = min(state["blocksize"], n_elements)  # so that no row is longer than the tensor
    n_scales = -(-n_elements // n_a_block)
    if stored.n_bytes != -(-n_elements // 2):
        problem = f"`{name}` has {stored.n_bytes} bytes, its state has the shape {list(shape)}"
        raise _misfit(checkpoint, stored, problem)
    nested = None
    if name + ".nested_absmax" in checkpoint.tensors:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(size) is not int or size < 1 or not _is_offset(offset):
            problem = f"the state of `{name}` has no `nested_blocksize` and `nested_offset`"
            raise _misfit(checkpoint, stored, problem)
        size = min(size, n_scales)
        table = part(".nested_quant_map", "F32", 256)
        scale = part(".nested_absmax", "F32", -(-n_scales // size))
        nested = Nested(table, scale, size, float(offset))
    scale = part(".absmax", "U8" if nested else "F32", n_scales)
    table = part(".quant_map", "F32", 16)
    return _as_float32(name, shape, FourBit(stored, codes, table, scale, n_a_block, nested))


def _is_offset(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < MAX_OFFSET


def _from_blocks(checkpoint: Checkpoint, stored: TensorHeader) -> TensorHeader:
    """MXFP4: codes (n, columns, blocks, 16) are n matrices of (32 * blocks, columns)."""
    name = stored.name.removesuffix(BLOCKS)
    if stored.dtype != "U8" or len(stored.shape) != 4 or stored.shape[-1] != BLOCK_BYTES:
        expected = f"U8 of four dimensions, the last of {BLOCK_BYTES}"
        raise _misfit(checkpoint, stored, f"{_describe(stored)}, expected {expected}")
    scale = _part(checkpoint, name + BLOCK_SCALES, stored)
    if (scale.dtype, scale.shape) != ("U8", stored.shape[:-1]):
        raise _unfit(checkpoint, scale, stored)
    n, n_columns, n_blocks, _ = stored.shape
    shape = (n, n_blocks * BLOCK_VALUES, n_columns)
    return _as_float32(name, shape, Transposed(stored, "MXFP4", "MXFP4", scale))


def _from_words(
    checkpoint: Checkpoint, stored: TensorHeader, layout: Layout, how: Quantisation
) -> TensorHeader:
    """GPTQ packs codes as (columns in words, rows), AWQ as (columns, rows in words)."""
    module, n_bits = stored.name.removesuffix(CODES), how.n_packed_bits or 4
    if stored.dtype != "I32" or len(stored.shape) != 2:
        raise _misfit(checkpoint, stored, f"{_describe(stored)}, expected I32 of two dimensions")
    scale = _part(checkpoint, f"{module}scales", stored)
    zero = _part(checkpoint, f"{module}qzeros", stored)
    groups = checkpoint.tensors.get(f"{module}g_idx")
    n_down, n_across = stored.shape
    if layout == "AWQ":
        n_rows, n_columns = n_across * WORD_BITS // n_bits, n_down
    else:
        n_packed = n_down * WORD_BITS
        fitting = (b for b in PACKED_BITS if groups and groups.n_elements * b == n_packed)
        n_bits = next(fitting, n_bits)
        n_rows, n_columns = n_across, n_down * WORD_BITS // n_bits
    if scale.dtype not in MERGEABLE or scale.shape[1:] != (n_rows,):
        raise _unfit(checkpoint, scale, stored)
    n_groups = scale.shape[0]
    zeros = ("I32", (n_groups, n_rows * n_bits // WORD_BITS))
    if (zero.dtype, zero.shape) != zeros or n_rows * n_bits % WORD_BITS:
        raise _unfit(checkpoint, zero, scale)
    if groups and (groups.dtype, groups.shape) != ("I32", (n_columns,)):
        raise _unfit(checkpoint, groups, stored)
    if not n_groups or (not groups and n_columns % n_groups):
        problem = f"{_describe(scale)}, which does not divide {n_columns} columns into equal groups"
        raise _misfit(checkpoint, stored, problem)
    codes: Literal["I4", "I8"] = "I4" if n_bits == 4 else "I8"
    packed = Transposed(stored, codes, layout, scale, zero, how.offset, groups)
    return _as_float32(f"{module}weight", (n_rows, n_columns), packed)


def _part(checkpoint: Checkpoint, name: str, owner: TensorHeader) -> TensorHeader:
    if name not in checkpoint.tensors:
        raise _misfit(checkpoint, owner, f"`{name}` is missing")
    return checkpoint.tensors[name]


def _misfit(
    checkpoint: Checkpoint, tensor: TensorHeader, problem: str, remedy: str = INTACT
) -> BrokenCheckpointError:
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)


def _unfit(
    checkpoint: Checkpoint, part: TensorHeader, other: TensorHeader
) -> BrokenCheckpointError:
    problem = f"{_describe(part)}, which does not fit {other.name} of shape {list(other.shape)}"
    return _misfit(checkpoint, part, problem)


def _describe(tensor: TensorHeader) -> str:
    return f"`{tensor.name}` is {tensor.dtype} of shape {list(tensor.shape)}"
