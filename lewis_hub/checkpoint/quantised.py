"""What a model's configuration says about its quantisation, and whether that can be read here.

8-bit floats (F8_E4M3) with a scale for each block, row or tensor are read: those that DeepSeek,
Qwen and Mistral publish, and what AutoFP8, FBGEMM, ModelOpt and compressed-tensors write of the
kind; compressed-tensors' integers of 8 bits, or packed ones of 4 and 8; what bitsandbytes writes;
GPTQ of 4 and 8 bits, AWQ's gemm, and gpt-oss' MXFP4. Everything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from lewis_hub.checkpoint.header import (
    COPIED,
    MERGEABLE,
    Codes,
    FourBit,
    Layout,
    Nested,
    Scaled,
    TensorHeader,
    Transposed,
)
from lewis_hub.checkpoint.reader import N_REQUESTS, Checkpoint
from lewis_hub.errors import BrokenCheckpointError

EIGHT_BIT_BLOCK = (
    128,
    128,
)  # rows and columns that share a scale, unless a configuration says others
STORED = "F8_E4M3"
EIGHT_BIT_SCALES = ("_scale_inv", "_scale")  # after the tensor's name; both are multiplied by
OF_ACTIVATIONS = (  # measured for running the quantised model: the weights are what they are
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


def scaled(checkpoint: Checkpoint, block: tuple[int, int] = EIGHT_BIT_BLOCK) -> Checkpoint:
    """The same checkpoint with its 8-bit floats in float32, and without their scales.

    Tensors that have no scale are left as they are.

    Args:
        checkpoint: as its files hold it.
        block: rows and columns that share a scale, where a scale is for neither row nor tensor.

    Raises:
        BrokenCheckpointError: a scale does not fit its tensor.
    """
    tensors = checkpoint.tensors
    scales = {
        name: tensors[name + ending]
        for name, tensor in tensors.items()
        if tensor.dtype == STORED
        for ending in EIGHT_BIT_SCALES
        if name + ending in tensors
    }
    if not scales:
        return checkpoint
    dropped = {scale.name for scale in scales.values()}
    dropped |= {name for name in tensors if name.endswith(OF_ACTIVATIONS)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    for name, scale in scales.items():
        stored = tensors[name]
        made = Scaled(stored, scale, block_of(checkpoint.label, stored, scale, block))
        kept[name] = replace(stored, dtype="F32", n_bytes=4 * stored.n_elements, scaled=made)
    return replace(checkpoint, tensors=kept)


def block_of(
    label: str, stored: TensorHeader, scale: TensorHeader, block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes.

    Args:
        label: the source, for messages.
        stored: of the shape that the values have.
        scale: of the tensor.
        block: rows and columns of a block, where the scales are for blocks.

    Raises:
        BrokenCheckpointError: the scale does not fit.
    """
    where = f"{label}: {scale.shard}"
    if scale.dtype not in MERGEABLE:
        problem = f"`{scale.name}` is {scale.dtype}, which is not read as a scale"
        remedy = "Use the model that it was quantised from, in bfloat16, float16 or float32."
        raise BrokenCheckpointError(where, problem, remedy)
    if scale.n_elements == 1:
        return max(1, stored.n_elements), max((1, *stored.shape[-1:]))
    if len(stored.shape) == 2:
        n_rows, n_columns = stored.shape
        if scale.shape in ((n_rows, 1), (n_rows,)):
            return 1, max(1, n_columns)
        if scale.shape == (-(-n_rows // block[0]), -(-n_columns // block[1])):
            return block
        if len(scale.shape) == 2 and scale.shape[0] == n_rows and _divides(scale.shape, n_columns):
            return 1, n_columns // scale.shape[1]
    problem = (
        f"`{scale.name}` has shape {list(scale.shape)}, which fits {stored.name} of shape "
        f"{list(stored.shape)} neither by tensor, by row, by group, nor by blocks of {list(block)}"
    )
    remedy = "Use an intact copy, or the model that it was quantised from."
    raise BrokenCheckpointError(where, problem, remedy)


def _divides(scale: tuple[int, ...], n_columns: int) -> bool:
    return scale[1] > 0 and n_columns % scale[1] == 0


KEYS = ("quantization_config", "compression_config")  # in config.json; the second is the older
LOOSE = {"naive-quantized", "int-quantized", "float-quantized"}  # formats of compressed-tensors
PACKED = "pack-quantized"
PACKED_BITS = {4, 8}  # others lie across words, and in older files otherwise
SELF_TELLING = "bitsandbytes"  # its tensors say how they were quantised
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # its formats -> what zeros are stored less
PLAIN_FP8 = {"fp8", "fbgemm_fp8"}  # methods whose every quantised tensor is of the kind
ENDINGS = {  # of tensors that only a quantised model has -> who writes them
    ".qweight": "GPTQ and AWQ",
    ".qzeros": "GPTQ and AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_2": "ModelOpt",
    ".pre_quant_scale": "ModelOpt",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "._data": "quanto",
    "_qdata": "torchao",
    "_blocks": "gpt-oss (MXFP4)",
}


@dataclass(frozen=True)
class Quantisation:
    """How a model was quantised.

    Attributes:
        method: as its configuration calls it.
        is_read: whether its weights can be read here.
        block: rows and columns that share a scale, where a scale is for none of row, group and
            tensor.
        integers: whether integers with scales are weights, as in compressed-tensors.
        n_packed_bits: of integers that lie in words of 32 bits; None: none do.
        layout: of matrices that are stored by columns; None: none are.
        offset: of zeros, which are stored less this.
    """

    method: str
    is_read: bool
    block: tuple[int, int] = EIGHT_BIT_BLOCK
    integers: bool = False
    n_packed_bits: int | None = None
    layout: Layout | None = None
    offset: int = 0


def read_quantisation(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None = None
) -> Quantisation | None:
    """What a configuration says; None where it says nothing of quantisation.

    Args:
        config: the content of ``config.json``.
        beside: that of ``hf_quant_config.json``, where ModelOpt says it.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    told = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if told is None and beside:
        told = {"quant_method": "modelopt", **_mapping(beside.get("quantization"))}
    if told is None:
        return None
    told = _mapping(told)
    method = str(told.get("quant_method") or "unknown")
    block = told.get("weight_block_size") or next(_blocks(told), None) or EIGHT_BIT_BLOCK
    if not _is_block(block):
        return Quantisation(f"{method}, blocks of {block}", is_read=False)
    if method == "compressed-tensors":
        return _compressed(method, told, (block[0], block[1]))
    if method in BY_COLUMNS:
        return BY_COLUMNS[method](method, told)
    return Quantisation(method, _is_read(method, told), (block[0], block[1]))


def signs(checkpoint: Checkpoint) -> str | None:
    """A tensor that shows quantisation where the configuration is silent; None: there is none."""
    for name, tensor in checkpoint.tensors.items():
        writer = next((who for ending, who in ENDINGS.items() if name.endswith(ending)), None)
        if writer:
            return f"{name}, as in {writer}"
        is_matrix = name.endswith(".weight") and len(tensor.shape) > 1
        if is_matrix and tensor.dtype in COPIED:
            return f"{name} as {tensor.dtype}"
    return None


def _is_read(method: str, told: Mapping[str, Any]) -> bool:
    if method == "modelopt":
        return told.get("quant_algo") == "FP8"
    if method == SELF_TELLING:
        return True
    return method in PLAIN_FP8 and told.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")


def _gptq(method: str, told: Mapping[str, Any]) -> Quantisation:
    form = str(told.get("checkpoint_format") or told.get("format") or "gptq").lower()
    is_own = form not in GPTQ_OFFSETS or told.get("is_marlin_format")
    if is_own or told.get("pack_dtype", "int32") != "int32":
        form = "marlin" if told.get("is_marlin_format") else form
        return Quantisation(f"{method}, {form} in {told.get('pack_dtype', 'int32')}", is_read=False)
    n_bits = told.get("bits")
    if n_bits not in PACKED_BITS:
        return Quantisation(f"{method}, {n_bits} bits", is_read=False)
    offset = GPTQ_OFFSETS[form]
    return Quantisation(method, is_read=True, n_packed_bits=n_bits, layout="GPTQ", offset=offset)


def _awq(method: str, told: Mapping[str, Any]) -> Quantisation:
    form = str(told.get("version") or told.get("format") or "gemm").lower()
    n_bits = told.get("bits", told.get("w_bit"))
    if form != "gemm" or n_bits != 4:
        return Quantisation(f"{method}, {form} of {n_bits} bits", is_read=False)
    return Quantisation(method, is_read=True, n_packed_bits=4, layout="AWQ")


def _mxfp4(method: str, _: Mapping[str, Any]) -> Quantisation:
    return Quantisation(method, is_read=True, n_packed_bits=4, layout="MXFP4")


BY_COLUMNS = {"gptq": _gptq, "awq": _awq, "mxfp4": _mxfp4}


def _compressed(method: str, told: Mapping[str, Any], block: tuple[int, int]) -> Quantisation:
    """Read only where every group of tensors can be, and nothing else was done to them."""
    groups = [_mapping(group) for group in _mapping(told.get("config_groups")).values()]
    weights = [
        (group.get("format") or told.get("format"), _mapping(group["weights"]))
        for group in groups
        if group.get("weights")
    ]
    packed = {one.get("num_bits") for form, one in weights if form == PACKED}
    sparsity = _mapping(told.get("sparsity_config")).get("format", "dense")
    rotated = _mapping(told.get("transform_config")).get("config_groups")
    is_plain = bool(weights) and sparsity == "dense" and not rotated and len(packed) < 2
    if not is_plain or not all(_is_code(form, one) for form, one in weights):
        forms = sorted({str(form) for form, _ in weights} or {str(told.get("format"))})
        return Quantisation(f"{method}, {' and '.join(forms)}", is_read=False)
    integers = any(one.get("type", "int") == "int" for _, one in weights)
    n_bits = next(iter(packed), None)
    return Quantisation(method, is_read=True, block=block, integers=integers, n_packed_bits=n_bits)


def _is_code(form: Any, weights: Mapping[str, Any]) -> bool:
    """Whether weights of a format of compressed-tensors are read."""
    n_bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if form == PACKED:
        return kind == "int" and n_bits in PACKED_BITS
    return form in LOOSE and n_bits == 8 and kind in ("int", "float")


def _blocks(told: Mapping[str, Any]) -> Iterator[Any]:
    for group in _mapping(told.get("config_groups")).values():
        block = _mapping(_mapping(group).get("weights")).get("block_structure")
        if block:
            yield block


def _is_block(found: Any) -> bool:
    pair = isinstance(found, (list, tuple)) and len(found) == 2
    return pair and all(type(n) is int and n > 0 for n in found)


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


KINDS: Mapping[str, Literal["NF4", "FP4"]] = {
    ".quant_state.bitsandbytes__nf4": "NF4",
    ".quant_state.bitsandbytes__fp4": "FP4",
}
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *KINDS)
ROWS, FORMAT = "SCB", "weight_format"  # of 8 bits: beside `weight`
MAX_STATE_BYTES = 1 << 16

ReadTensor = Callable[[TensorHeader], bytes]


def bits_and_bytes(checkpoint: Checkpoint, read: ReadTensor) -> Checkpoint:
    """The same checkpoint with its 4 and 8 bits in float32, and without what belongs to them.

    Args:
        checkpoint: as its files hold it.
        read: the bytes of a small tensor, which says how another was quantised; called from
            several threads.

    Raises:
        BrokenCheckpointError: a part is missing, or does not fit its tensor.
    """
    tensors = dict(checkpoint.tensors)
    states = {name: kind for name in tensors for kind in KINDS if name.endswith(kind)}
    if states:
        with ThreadPoolExecutor(N_REQUESTS) as pool:
            told = dict(
                zip(states, pool.map(lambda n: _state(checkpoint, n, read), states), strict=True)
            )
        for name, kind in states.items():
            weight = name.removesuffix(kind)
            tensors[weight] = _of_four(checkpoint, weight, KINDS[kind], told[name])
    rows = [name for name, tensor in tensors.items() if _is_of_eight(tensor, checkpoint)]
    for name in rows:
        tensors[name] = _of_eight(checkpoint, name)
    if not states and not rows:
        return checkpoint
    dropped = {name.removesuffix(kind) + part for name, kind in states.items() for part in PARTS}
    dropped |= {name.removesuffix("weight") + part for name in rows for part in (ROWS, FORMAT)}
    return replace(checkpoint, tensors={n: t for n, t in tensors.items() if n not in dropped})


def _state(checkpoint: Checkpoint, name: str, read: ReadTensor) -> Mapping[str, Any]:
    tensor = checkpoint.tensors[name]
    if tensor.n_bytes > MAX_STATE_BYTES:
        raise _broken(checkpoint, tensor, f"`{name}` has {tensor.n_bytes:,} bytes, too many")
    try:
        found: dict[str, Any] = json.loads(read(tensor))
    except ValueError:
        raise _broken(checkpoint, tensor, f"`{name}` is not JSON") from None
    shape = found.get("shape") if isinstance(found, dict) else None
    counts = [*shape, found.get("blocksize")] if isinstance(shape, list) else [None]
    if not all(type(n) is int and n > 0 for n in counts):
        raise _broken(checkpoint, tensor, f"`{name}` gives no `shape` and `blocksize`")
    return found


def _of_four(
    checkpoint: Checkpoint, name: str, codes: Literal["NF4", "FP4"], told: Mapping[str, Any]
) -> TensorHeader:
    stored = _part(checkpoint, name, "", None)
    shape, n_a_block = tuple(told["shape"]), told["blocksize"]
    n = prod(shape)
    n_scales = -(-n // n_a_block)
    if stored.n_bytes != -(-n // 2):
        text = f"`{name}` has {stored.n_bytes} bytes, its state is of shape {list(shape)}"
        raise _broken(checkpoint, stored, text)
    nested = None
    if name + ".nested_absmax" in checkpoint.tensors:
        size, offset = told.get("nested_blocksize"), told.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, (int, float)):
            text = f"the state of `{name}` gives no `nested_blocksize` and `nested_offset`"
            raise _broken(checkpoint, stored, text)
        table = _part(checkpoint, name, ".nested_quant_map", ("F32", 256))
        scale = _part(checkpoint, name, ".nested_absmax", ("F32", -(-n_scales // size)))
        nested = Nested(table, scale, size, float(offset))
    scale = _part(checkpoint, name, ".absmax", ("U8" if nested else "F32", n_scales))
    table = _part(checkpoint, name, ".quant_map", ("F32", 16))
    made = FourBit(stored, codes, table, scale, n_a_block, nested)
    return replace(stored, dtype="F32", shape=shape, n_bytes=4 * n, scaled=made)


def _is_of_eight(tensor: TensorHeader, checkpoint: Checkpoint) -> bool:
    is_weight = tensor.name.endswith(".weight") and tensor.dtype == "I8"
    return is_weight and tensor.name.removesuffix("weight") + ROWS in checkpoint.tensors


def _of_eight(checkpoint: Checkpoint, name: str) -> TensorHeader:
    stored = checkpoint.tensors[name]
    scale = checkpoint.tensors[name.removesuffix("weight") + ROWS]
    if scale.dtype != "F32" or scale.shape != stored.shape[:1] or len(stored.shape) != 2:
        text = f"`{scale.name}` is {scale.dtype} of shape {list(scale.shape)}"
        text += f", which fits no rows of {name} of shape {list(stored.shape)}"
        raise _broken(checkpoint, scale, text)
    made = Scaled(stored, scale, (1, max(1, stored.shape[1])), "INT8")
    return replace(stored, dtype="F32", n_bytes=4 * stored.n_elements, scaled=made)


def _part(
    checkpoint: Checkpoint, name: str, part: str, wanted: tuple[str, int] | None
) -> TensorHeader:
    """A tensor that belongs to another, of this dtype and so many elements."""
    found = checkpoint.tensors.get(name + part)
    if found is None:
        where = next(iter(checkpoint.tensors.values()))
        raise _broken(checkpoint, where, f"there is no `{name}{part}`")
    if wanted and (found.dtype, found.n_elements) != wanted:
        text = f"`{found.name}` is {found.dtype} of {found.n_elements} elements, "
        raise _broken(checkpoint, found, f"{text}where {wanted[0]} of {wanted[1]} are expected")
    return found


def _broken(checkpoint: Checkpoint, tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)


PACKED_INTEGERS = "_packed"
INTEGER_PARTS = ("_scale", "_zero_point", "_g_idx", "_shape")  # after the weight's name
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
        elif n_bits and stored.dtype == "I32" and name.endswith(PACKED_INTEGERS):
            values, codes = _loosened(stored, n_bits), _codes(n_bits)
        else:
            kept[name] = stored
            continue
        made = replace(_scaled(checkpoint, values, codes, block), stored=stored)
        n_bytes = 4 * values.n_elements
        kept[values.name] = replace(values, dtype="F32", n_bytes=n_bytes, scaled=made)
        dropped |= {values.name + part for part in INTEGER_PARTS}
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
    return replace(stored, name=stored.name.removesuffix(PACKED_INTEGERS), shape=shape)


def _scaled(
    checkpoint: Checkpoint, values: TensorHeader, codes: Codes, block: tuple[int, int]
) -> Scaled:
    parts = {part: checkpoint.tensors.get(values.name + part) for part in INTEGER_PARTS}
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


WEIGHT, TRANSPOSED_PARTS = (
    "qweight",
    ("scales", "qzeros", "g_idx"),
)  # of GPTQ and AWQ: after the module's name
BLOCKS, TRANSPOSED_SCALES = "_blocks", "_scales"  # of MXFP4: after the tensor's name
TRANSPOSED_WORD = 32  # bits
TRANSPOSED_BLOCK = 32  # values of MXFP4 that share a scale, in 16 bytes
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
            found, parts = (
                _of_blocks(checkpoint, stored),
                {name.removesuffix(BLOCKS) + TRANSPOSED_SCALES},
            )
        else:
            found = _of_words(checkpoint, stored, layout, n_bits, offset)
            parts = {name.removesuffix(WEIGHT) + part for part in TRANSPOSED_PARTS}
        made[name] = found
        dropped |= parts
    kept = (tensor for name, tensor in made.items() if name not in dropped)
    return replace(checkpoint, tensors={tensor.name: tensor for tensor in kept})


def _of_blocks(checkpoint: Checkpoint, stored: TensorHeader) -> TensorHeader:
    """Of MXFP4: codes (n, rows, blocks, 16) become n matrices of (32 * blocks, rows)."""
    name = stored.name.removesuffix(BLOCKS)
    scale = checkpoint.tensors.get(name + TRANSPOSED_SCALES)
    fits = (
        stored.dtype == "U8"
        and len(stored.shape) == 4
        and stored.shape[-1] == TRANSPOSED_BLOCK // 2
    )
    if not fits:
        half = TRANSPOSED_BLOCK // 2
        text = f"{_said(stored)}, where U8 of four dimensions, the last of {half}, is expected"
        raise _transposed_misfit(checkpoint, stored, text)
    if scale is None or (scale.dtype, scale.shape) != ("U8", stored.shape[:-1]):
        raise _transposed_misfit(
            checkpoint, stored, _unfit(scale, f"`{name}{TRANSPOSED_SCALES}`", stored)
        )
    n, n_columns, n_blocks, _ = stored.shape
    code = Transposed(stored, "MXFP4", "MXFP4", scale)
    return _as_floats(stored, name, (n, n_blocks * TRANSPOSED_BLOCK, n_columns), code)


def _of_words(
    checkpoint: Checkpoint, stored: TensorHeader, layout: Layout, n_bits: int, offset: int
) -> TensorHeader:
    """Of GPTQ, codes (columns in words, rows); of AWQ (columns, rows in words)."""
    module = stored.name.removesuffix(WEIGHT)
    scale, zero, groups = (checkpoint.tensors.get(module + part) for part in TRANSPOSED_PARTS)
    if stored.dtype != "I32" or len(stored.shape) != 2:
        raise _transposed_misfit(
            checkpoint, stored, f"{_said(stored)}, where I32 of two dimensions is expected"
        )
    n_down, n_across = stored.shape
    if layout == "AWQ":
        n_rows, n_columns = n_across * TRANSPOSED_WORD // n_bits, n_down
    else:
        told = (b for b in BITS if groups and groups.shape == (n_down * TRANSPOSED_WORD // b,))
        n_bits = next(told, n_bits)
        n_rows, n_columns = n_across, n_down * TRANSPOSED_WORD // n_bits
    if scale is None or scale.dtype not in MERGEABLE or scale.shape[1:] != (n_rows,):
        raise _transposed_misfit(checkpoint, stored, _unfit(scale, f"`{module}scales`", stored))
    n_groups = scale.shape[0]
    zeros = ("I32", (n_groups, n_rows * n_bits // TRANSPOSED_WORD))
    if zero is None or (zero.dtype, zero.shape) != zeros or n_rows * n_bits % TRANSPOSED_WORD:
        raise _transposed_misfit(checkpoint, stored, _unfit(zero, f"`{module}qzeros`", scale))
    if groups and (groups.dtype, groups.shape) != ("I32", (n_columns,)):
        raise _transposed_misfit(checkpoint, stored, _unfit(groups, f"`{module}g_idx`", stored))
    if not n_groups or (not groups and n_columns % n_groups):
        text = f"{_said(scale)}, which are no equal groups of {n_columns} columns"
        raise _transposed_misfit(checkpoint, stored, text)
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


def _transposed_misfit(
    checkpoint: Checkpoint, tensor: TensorHeader, problem: str
) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(f"{checkpoint.label}: {tensor.shard}", problem, remedy)
