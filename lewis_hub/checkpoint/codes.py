"""How quantised tensors are stored: which tensors hold their codes, and which their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lewis_hub.checkpoint.header import TensorHeader

Codes = Literal["F8_E4M3", "I8", "I4", "INT8"]
Layout = Literal["GPTQ", "AWQ", "MXFP4"]


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


@dataclass(frozen=True)
class Transposed:
    """How GPTQ, AWQ and MXFP4 store matrices: by columns of what they are read as.

    A value is its code, less the zero of its group, times the group's scale. A group is some of the
    columns of one row; of MXFP4 it is 32 rows of one column.

    Attributes:
        stored: the codes, of 4 bits from the lowest ones on. GPTQ: a word of 32 bits holds the next
            columns of one row. AWQ: it holds 8 rows of one column, those of even places first.
            MXFP4: a byte holds two rows of one column.
        codes: what they are called.
        layout: which of the three it is.
        scale: what values are multiplied by: of each group and row, or for MXFP4 powers of two of
            each column and 32 rows.
        zero: what is subtracted: of each group, as the scales lie, rows packed in words; None:
            nothing.
        offset: added to every zero; what is more than a code holds is carried into the word's next.
        groups: per column the number of its group; None: they are of equal size, in their order.
    """

    stored: TensorHeader
    codes: Literal["I4", "I8", "MXFP4"]
    layout: Layout
    scale: TensorHeader
    zero: TensorHeader | None = None
    offset: int = 0
    groups: TensorHeader | None = None
