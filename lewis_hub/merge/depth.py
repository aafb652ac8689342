"""The blocks of a model in the places of those of a model of another depth.

A place without a block of the model gets an identity block: the reference's block, with zeros in
the matrices that write into the residual stream. So a model in the places of a deeper one has the
outputs that it had. In those of a shallower one, the blocks without a place are left out.

This is the first of two steps. The tensors keep the width of the model; `in_widths` puts them into
that of the reference, which may be the same.

The paper (arXiv:2501.00061) merges into the deeper model. In its code, for convolutions, all
weights of an identity block are zero, but those of a shortcut. With the reference's weights, the
mean of both blocks adds exactly half of what the reference's block adds to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, NO_FILE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.symmetries import IN_RESIDUAL, Axes, Units

REMEDY = "`depth` matches the blocks of models that differ in their number only."
OTHER_WIDTH = f"{REMEDY} For another width, add `width: neuron_matching`."
ALIKE = "`depth` matches blocks with the same tensors, of the same shapes."
OTHER_ROWS = "Give it the other tokenizer first: `lewis-hub transplant-tokenizer`."

Shape = tuple[int, ...]
Blocks = tuple[int | None, ...]  # for each block of the reference, the model's own; None: none


def in_places(reference: Checkpoint, own: Checkpoint, blocks: Blocks, units: Units) -> Checkpoint:
    """The stored tensors of a model by the names of the reference's, in the model's own width.

    Of an identity block it has the matrices that write into the residual stream, which are zeros.
    All other tensors of the block are absent: they are the reference's.

    Args:
        reference: the model whose depth is taken.
        own: the model, which `require_same_blocks` accepted.
        blocks: the model's block for each block of the reference.
        units: of the reference.
    """
    tensors = {}
    for name, tensor in reference.tensors.items():
        if tensor.dtype not in MERGEABLE or name not in units.axes:
            continue  # a buffer, equal in all blocks
        if (stored := stored_name(name, blocks)) is not None:
            tensors[name] = own.tensors[stored]
        elif names.component(name) in units.family.writers:
            first = own.tensors[names.renumbered(name, 0)]
            tensors[name] = _zeros(tensor, first, units.axes[name])
    return Checkpoint(own.label, tensors)


def stored_name(name: str, blocks: Blocks | None) -> str | None:
    """What a model calls a tensor, a site or a group of units that is in a place of its own.

    Args:
        name: with the number of the place.
        blocks: the model's block for each place; None: it has its own number everywhere.

    Returns:
        The name with the model's number; None in an identity block.
    """
    place = names.block(name)
    if blocks is None or place is None:
        return name
    number = blocks[place]
    return None if number is None else names.renumbered(name, number)


def first_places(n_reference: int, n_own: int) -> Blocks:
    """Places with the same headers as any others, before it is known where blocks go."""
    return tuple(block if block < n_own else None for block in range(n_reference))


def require_same_blocks(model: Checkpoint, like: Checkpoint) -> None:
    """Refuse a model with a block, or a tensor outside them, that is not as in block 0 of `like`.

    Raises:
        AlignmentError: names a tensor that the model lacks, or that has another shape.
    """
    is_own = model is like
    like_it, remedy = ("its first block", ALIKE) if is_own else (like.label, REMEDY)
    first = {name: s for name, s in _shapes(like).items() if names.block(name) in (None, 0)}
    found, wanted = _shapes(model), set[str]()
    blocks = list(dict.fromkeys(names.block(name) or 0 for name in found))
    for name, shape in _in_all_blocks(first, blocks):
        if name not in found:
            raise AlignmentError(model.label, f"it lacks {name} of {like_it}", remedy)
        if found[name] != shape:
            problem = f"{name} has the shape {[*found[name]]}, in {like_it} {[*shape]}"
            is_rows = names.may_have_tokens(name) and found[name][1:] == shape[1:]
            other = OTHER_ROWS if is_rows else ALIKE if is_own else OTHER_WIDTH
            raise AlignmentError(model.label, problem, other)
        wanted.add(name)
    if more := next((name for name in found if name not in wanted), None):
        problem = f"it has {more}, which is not in {like_it}"
        raise AlignmentError(model.label, problem, remedy)


def _in_all_blocks(
    first: Mapping[str, Shape], blocks: Sequence[int]
) -> Iterator[tuple[str, Shape]]:
    """One by one: a header may name as many blocks as it has tensors."""
    for name, shape in first.items():
        for number in blocks if names.block(name) is not None else (0,):
            yield names.renumbered(name, number), shape


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    tensors = checkpoint.tensors.items()
    return {name: tensor.shape for name, tensor in tensors if tensor.dtype in MERGEABLE}


def _zeros(tensor: TensorHeader, own: TensorHeader, axes: Axes) -> TensorHeader:
    """Zeros as large as the reference's tensor, but with the model's own residual stream."""
    sizes = zip(tensor.shape, own.shape, axes, strict=True)
    shape = tuple(size if axis == IN_RESIDUAL else fixed for fixed, size, axis in sizes)
    return TensorHeader(tensor.name, "F32", shape, NO_FILE, 0, 4 * prod(shape))
