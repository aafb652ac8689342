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
from lewis_hub.merge.operands import FORMATS
from lewis_hub.merge.plain import narrowed, odd, widened
from lewis_hub.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.plan import ShardPlan

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
        if tensor.dtype not in FORMATS:
            return
        found = _bits(tensor.dtype, into)
        broken = odd(found, FORMATS[tensor.dtype])
        if broken.any():
            self.mended.add(tensor.name)
            found[broken] = self._stand_ins(tensor, first_byte, len(found))[broken]

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Nothing: every entry has to be looked at."""
        del tensor, first_byte, n_bytes
        return None

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
        found[odd(found, FORMATS[header.dtype])] = 0
        kind = FORMATS[tensor.dtype]
        given = widened(found.view(np.uint8), FORMATS[header.dtype], n)
        made: Bits = narrowed(given, kind)
        made[odd(made, kind)] = 0  # it does not fit
        return made


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
