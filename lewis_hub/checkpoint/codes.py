"""How quantised tensors are stored: which tensors hold their codes, and which their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lewis_hub.checkpoint.header import TensorHeader

Codes = Literal["F8_E4M3", "I8", "I4", "INT8"]


@dataclass(frozen=True)
class Scaled:
    """How a quantised tensor is stored: a value is its code, less the zero of its block, scaled.

    Attributes:
        stored: the codes, row by row. In words of 32 bits they are packed from the lowest bits
            on, and shifted so that none is negative.
        codes: what they are, also where they are packed; INT8 is in 127ths.
        scale: what they are multiplied by: one number a block, row by row.
        block: rows and columns of a block; the last ones may be smaller.
        zero: what is subtracted: one code a block, as the scales lie, or packed down the columns;
            None: nothing.
        groups: per column the number of its block; None, or all negative: in their order.
        measure: holds the shape; None: no tensor does.
    """

    stored: TensorHeader
    scale: TensorHeader
    block: tuple[int, int]
    codes: Codes = "F8_E4M3"
    zero: TensorHeader | None = None
    groups: TensorHeader | None = None
    measure: TensorHeader | None = None


@dataclass(frozen=True)
class Nested:
    """How the scales of `FourBit` are stored where they are quantised themselves, to 8 bits.

    Attributes:
        table: (256,) what a code stands for.
        scale: one number for every `n_a_block` of them.
        n_a_block: scales that share a scale.
        offset: added to each.
    """

    table: TensorHeader
    scale: TensorHeader
    n_a_block: int
    offset: float


@dataclass(frozen=True)
class FourBit:
    """How bitsandbytes stores a tensor: a table's entry times the scale of its block.

    Attributes:
        stored: the codes, two in a byte, the higher bits first.
        codes: what they are called.
        table: (16,) what a code stands for.
        scale: one number for every `n_a_block` elements, row by row.
        n_a_block: elements that share a scale.
        nested: how the scales are stored; None: as they are.
    """

    stored: TensorHeader
    codes: Literal["NF4", "FP4"]
    table: TensorHeader
    scale: TensorHeader
    n_a_block: int
    nested: Nested | None
