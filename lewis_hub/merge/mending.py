"""Sources that hold NaN or infinity, read all the same: what `--allow-nan` asks for.

An entry that is not finite counts as the base's, so that its task vector is zero there; where the
base's is not finite either, or there is no base, it is zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Reader, whole_tensor
from lewis_hub.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.plan import ShardPlan

EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

Bits = npt.NDArray[np.unsignedinteger]


class MendingReader:
    """A source whose entries are finite. Threads may share it.

    Args:
        own: of the source; whoever opened it closes it.
        base: of the base; None: zeros stand in.
        bases: by the name of a tensor of the source, the base's that stands in.
    """

    def __init__(self, own: Reader, base: Reader | None, bases: Mapping[str, TensorHeader]) -> None:
        self._own, self._base, self._bases = own, base, bases
        self.mended: set[str] = set()  # names of tensors

    def __enter__(self) -> MendingReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with finite entries, from `first_byte` on, which begins one.

        Raises:
            BrokenCheckpointError: a file is missing, or ends before that.
        """
        self._own.read(tensor, first_byte, into)
        if tensor.dtype not in EXPONENTS:
            return
        found = _bits(tensor.dtype, into)
        odd = _odd(tensor.dtype, found)
        if odd.any():
            self.mended.add(tensor.name)
            found[odd] = self._stand_ins(tensor, first_byte, len(found))[odd]

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)

    def _stand_ins(self, tensor: TensorHeader, first_byte: int, n: int) -> Bits:
        width = WIDTHS[tensor.dtype]
        header = self._bases.get(tensor.name)
        if self._base is None or header is None:
            return np.zeros(n, f"<u{width}")
        held = bytearray(n * WIDTHS[header.dtype])
        self._base.read(header, first_byte // width * WIDTHS[header.dtype], memoryview(held))
        found = _bits(header.dtype, memoryview(held))
        found[_odd(header.dtype, found)] = 0
        return _as(tensor.dtype, header.dtype, found)


def mending(plan: ShardPlan, readers: Sequence[Reader]) -> Sequence[Reader]:
    """The readers of a shard's sources, wrapped where the plan allows for NaN."""
    if not plan.allow_nan:
        return readers
    bases: list[defaultdict[str, set[TensorHeader]]] = [defaultdict(set) for _ in readers]
    takes_base = registry.find(plan.method).takes_base
    for tensor in plan.tensors:
        for number, header in list(zip(tensor.sources, tensor.inputs, strict=True))[1:]:
            bases[number][header.name].add(tensor.inputs[0])
    first = {tensor.sources[0] for tensor in plan.tensors}
    base = readers[first.pop()] if takes_base and len(first) == 1 else None
    return [
        MendingReader(own, base, {name: one.pop() for name, one in told.items() if len(one) == 1})
        for own, told in zip(readers, bases, strict=True)
    ]


def _bits(dtype: str, raw: memoryview) -> Bits:
    return np.frombuffer(raw, np.dtype(f"<u{WIDTHS[dtype]}"))


def _odd(dtype: str, bits: Bits) -> npt.NDArray[np.bool_]:
    exponent = bits.dtype.type(EXPONENTS[dtype])
    return np.asarray((bits & exponent) == exponent)


def _as(dtype: str, given: str, bits: Bits) -> Bits:
    """Finite numbers of one format as those of another, zero where they do not fit."""
    if dtype == given:
        return bits
    if given == "BF16":
        values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = bits.view("<f2" if given == "F16" else "<f4").astype(np.float32)
    if dtype == "BF16":
        whole = values.view(np.uint32)
        even = np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))
        found: Bits = ((whole + even) >> np.uint32(16)).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):
            kind = "<f2" if dtype == "F16" else "<f4"
            found = values.astype(kind).view(f"<u{WIDTHS[dtype]}")
    found[_odd(dtype, found)] = 0
    return found
