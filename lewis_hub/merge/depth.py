"""The headers of a model whose blocks are put in the places of those of a model of another depth.

A place without a block of the model gets an identity block: the reference's block, with zeros in
the matrices that write into the residual stream. So a model in the places of a deeper one has the
outputs that it had. In those of a shallower one, the blocks without a place are left out.

The paper (arXiv:2501.00061) merges into the deeper model. In its code, for convolutions, all
weights of an identity block are zero, but those of a shortcut. With the reference's weights, the
mean of both blocks adds exactly half of what the reference's block adds to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, NO_FILE, Adapted, Fitted, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.symmetries import Units

REMEDY = "`depth` matches the blocks of models that differ in their number only."
OTHER_ROWS = "Give it the other tokenizer first: `lewis-hub transplant-tokenizer`."

Shape = tuple[int, ...]
Blocks = tuple[int | None, ...]  # for each block of the reference, the model's own; None: none


def in_places(
    reference: Checkpoint, own: Checkpoint, blocks: Sequence[int | None], units: Units
) -> Checkpoint:
    """The headers of a model with the names of the reference's tensors.

    Args:
        reference: the model whose depth is taken.
        own: the model, which `require_same_blocks` accepted.
        blocks: the model's block for each block of the reference.
        units: of the reference.
    """
    tensors = {}
    for name, tensor in reference.tensors.items():
        block = names.block(name)
        number = None if block is None else blocks[block]
        if tensor.dtype not in MERGEABLE or name not in units.axes:
            tensors[name] = tensor  # a buffer, equal in all blocks
        elif block is None or number is not None:
            stored = name if number is None else names.renumbered(name, number)
            tensors[name] = instead(tensor, own.tensors[stored])
        elif names.component(name) in units.family.writers:
            tensors[name] = instead(tensor, _zeros(tensor))
        else:
            tensors[name] = tensor
    return Checkpoint(own.label, tensors, reference.label)


def first_places(n_reference: int, n_own: int) -> Blocks:
    """Places with the same headers as any others, before it is known where blocks go."""
    return tuple(block if block < n_own else None for block in range(n_reference))


def require_same_blocks(reference: Checkpoint, own: Checkpoint) -> None:
    """Refuse models whose blocks, or tensors outside them, are not those of the reference.

    Raises:
        AlignmentError: names a tensor that a model lacks, or that has another shape.
    """
    first = {name: s for name, s in _shapes(reference).items() if names.block(name) in (None, 0)}
    for model in (reference, own):
        found, wanted = _shapes(model), set[str]()
        like = "its first block" if model is reference else reference.label
        blocks = list(dict.fromkeys(names.block(name) or 0 for name in found))
        for name, shape in _in_all_blocks(first, blocks):
            _require_shape(model.label, name, (found.get(name), shape), like)
            wanted.add(name)
        if more := next((name for name in found if name not in wanted), None):
            problem = f"it has {more}, which is not in {like}"
            raise AlignmentError(model.label, problem, REMEDY)


def _in_all_blocks(
    first: Mapping[str, Shape], blocks: Sequence[int]
) -> Iterator[tuple[str, Shape]]:
    """One by one: a header may name as many blocks as it has tensors."""
    for name, shape in first.items():
        for number in blocks if names.block(name) is not None else (0,):
            yield names.renumbered(name, number), shape


def _require_shape(label: str, name: str, shapes: tuple[Shape | None, Shape], like: str) -> None:
    found, expected = shapes
    if found is None:
        raise AlignmentError(label, f"it lacks {name} of {like}", REMEDY)
    if found != expected:
        problem = f"{name} has the shape {[*found]}, in {like} {[*expected]}"
        is_rows = names.may_have_tokens(name) and found[1:] == expected[1:]
        raise AlignmentError(label, problem, OTHER_ROWS if is_rows else REMEDY)


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    tensors = checkpoint.tensors.items()
    return {name: tensor.shape for name, tensor in tensors if tensor.dtype in MERGEABLE}


def instead(base: TensorHeader, saved: TensorHeader, fitted: Fitted | None = None) -> TensorHeader:
    """A tensor of the reference, with other values; `fitted` if they are of another size."""
    change, n_bytes = Adapted(base, saved, None, fitted), 4 * base.n_elements
    return TensorHeader(base.name, "F32", base.shape, saved.shard, 0, n_bytes, change)


def _zeros(like: TensorHeader) -> TensorHeader:
    return TensorHeader(like.name, "F32", like.shape, NO_FILE, 0, 4 * like.n_elements)
