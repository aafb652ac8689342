"""A checkpoint of bitsandbytes, of 4 or 8 bits, as one of float32: what belongs to which tensor.

It says of itself how it was quantised, whatever its configuration says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any, Literal

from lewis_hub.checkpoint.codes import FourBit, Nested, Scaled
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import N_REQUESTS, Checkpoint
from lewis_hub.errors import BrokenCheckpointError

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
