"""The 4 and 8 bits of bitsandbytes, whose tensors describe themselves.

4 bits: a packed weight, a table of 16 values, a scale for every block of elements, and a JSON
document in a tensor of bytes. 8 bits: a weight in 127ths, and a scale for every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any, Literal

from lewis_hub.checkpoint.block_scales import as_float32, describe, misfit
from lewis_hub.checkpoint.header import FourBit, Nested, Scaled, TensorHeader
from lewis_hub.checkpoint.reader import N_REQUESTS, Checkpoint

ReadTensor = Callable[[TensorHeader], bytes]

STATES: Mapping[str, Literal["NF4", "FP4"]] = {  # follow the name of the weight
    ".quant_state.bitsandbytes__nf4": "NF4",
    ".quant_state.bitsandbytes__fp4": "FP4",
}
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES)
ROW_SCALES, ROW_FORMAT = "SCB", "weight_format"  # of 8 bits: take the place of `weight`
MAX_STATE_BYTES = 1 << 16


def dequantise_bitsandbytes(checkpoint: Checkpoint, read: ReadTensor) -> Checkpoint:
    """Describe the tensors of 4 and 8 bits as float32, and drop the tensors that go with them.

    Args:
        checkpoint: as its files store it.
        read: the bytes of a small tensor; called from several threads.

    Raises:
        BrokenCheckpointError: a part is missing, or does not fit its tensor.
    """
    tensors = dict(checkpoint.tensors)
    states = {name: ending for name in tensors for ending in STATES if name.endswith(ending)}
    by_row = [name for name, tensor in tensors.items() if _has_row_scales(checkpoint, tensor)]
    if not states and not by_row:
        return checkpoint
    with ThreadPoolExecutor(N_REQUESTS) as pool:
        documents = pool.map(lambda name: _state(checkpoint, name, read), states)
    for (name, ending), state in zip(states.items(), documents, strict=True):
        weight = name.removesuffix(ending)
        tensors[weight] = _four_bit(checkpoint, weight, STATES[ending], state)
    for name in by_row:
        tensors[name] = _eight_bit(checkpoint, name)
    dropped = {name.removesuffix(e) + part for name, e in states.items() for part in FOUR_BIT_PARTS}
    dropped |= {
        n.removesuffix("weight") + part for n in by_row for part in (ROW_SCALES, ROW_FORMAT)
    }
    return replace(checkpoint, tensors={n: t for n, t in tensors.items() if n not in dropped})


def _state(checkpoint: Checkpoint, name: str, read: ReadTensor) -> Mapping[str, Any]:
    tensor = checkpoint.tensors[name]
    if tensor.n_bytes > MAX_STATE_BYTES:
        problem = f"`{name}` has {tensor.n_bytes:,} bytes; at most {MAX_STATE_BYTES:,} are read"
        raise misfit(checkpoint, tensor, problem)
    try:
        state: dict[str, Any] = json.loads(read(tensor))
    except ValueError:
        raise misfit(checkpoint, tensor, f"`{name}` is not JSON") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    sizes = [*shape, state.get("blocksize")] if isinstance(shape, list) else [None]
    if not all(type(n) is int and n > 0 for n in sizes):
        raise misfit(checkpoint, tensor, f"`{name}` has no `shape` and `blocksize`")
    return state


def _four_bit(
    checkpoint: Checkpoint, name: str, codes: Literal["NF4", "FP4"], state: Mapping[str, Any]
) -> TensorHeader:
    stored = _part(checkpoint, name, "", None)
    shape, n_a_block = tuple(state["shape"]), state["blocksize"]
    n_scales = -(-prod(shape) // n_a_block)
    if stored.n_bytes != -(-prod(shape) // 2):
        problem = f"`{name}` has {stored.n_bytes} bytes, its state has the shape {list(shape)}"
        raise misfit(checkpoint, stored, problem)
    nested = None
    if name + ".nested_absmax" in checkpoint.tensors:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, (int, float)):
            problem = f"the state of `{name}` has no `nested_blocksize` and `nested_offset`"
            raise misfit(checkpoint, stored, problem)
        table = _part(checkpoint, name, ".nested_quant_map", ("F32", 256))
        scale = _part(checkpoint, name, ".nested_absmax", ("F32", -(-n_scales // size)))
        nested = Nested(table, scale, size, float(offset))
    scale = _part(checkpoint, name, ".absmax", ("U8" if nested else "F32", n_scales))
    table = _part(checkpoint, name, ".quant_map", ("F32", 16))
    return as_float32(stored, name, shape, FourBit(stored, codes, table, scale, n_a_block, nested))


def _has_row_scales(checkpoint: Checkpoint, tensor: TensorHeader) -> bool:
    is_weight = tensor.name.endswith(".weight") and tensor.dtype == "I8"
    return is_weight and tensor.name.removesuffix("weight") + ROW_SCALES in checkpoint.tensors


def _eight_bit(checkpoint: Checkpoint, name: str) -> TensorHeader:
    stored = checkpoint.tensors[name]
    scale = checkpoint.tensors[name.removesuffix("weight") + ROW_SCALES]
    if scale.dtype != "F32" or scale.shape != stored.shape[:1] or len(stored.shape) != 2:
        problem = f"{describe(scale)}, which does not fit the rows of {name} of shape "
        raise misfit(checkpoint, scale, f"{problem}{list(stored.shape)}")
    scaled = Scaled(stored, scale, (1, max(1, stored.shape[1])), "INT8")
    return as_float32(stored, name, stored.shape, scaled)


def _part(
    checkpoint: Checkpoint, name: str, part: str, expected: tuple[str, int] | None
) -> TensorHeader:
    """A tensor that belongs to `name`, checked for dtype and number of elements."""
    tensor = checkpoint.tensors.get(name + part)
    if tensor is None:
        first = next(iter(checkpoint.tensors.values()))
        raise misfit(checkpoint, first, f"`{name}{part}` is missing")
    if expected and (tensor.dtype, tensor.n_elements) != expected:
        problem = f"`{tensor.name}` is {tensor.dtype} of {tensor.n_elements} elements, expected "
        raise misfit(checkpoint, tensor, f"{problem}{expected[0]} of {expected[1]}")
    return tensor
