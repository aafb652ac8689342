"""A checkpoint's blocks: counted, cut out and renumbered, and held against a configuration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge import parameters
from lewis_hub.merge.compare import Mismatch, compare


@dataclass(frozen=True)
class Place:
    """Where a slice lies in the output.

    Attributes:
        first: number of its first block.
        is_first: whether the tensors before the blocks (embeddings) are its own.
        is_last: whether those after them (final norm, head) are.
    """

    first: int
    n_blocks: int
    is_first: bool
    is_last: bool


def count_blocks(checkpoint: Checkpoint) -> int:
    """How many blocks a model has.

    Raises:
        MergeError: it has none, or several stacks of them.
    """
    last: dict[str, int] = {}
    for name in checkpoint.tensors:
        stack, number = names.stack(name), names.block(name)
        if stack is not None and number is not None:
            last[stack] = max(number, last.get(stack, 0))
    if len(last) != 1:
        found = f"several stacks of blocks ({', '.join(sorted(last))})" if last else "no blocks"
        problem = f"{checkpoint.label} has {found}, and slices cut one stack"
        raise MergeError("slices", problem, "List whole models under `models`.")
    return next(iter(last.values())) + 1


def cut(checkpoint: Checkpoint, blocks: range, place: Place) -> Checkpoint:
    """What of a model goes into a slice, by its names in the output."""
    inside, found = _by_block(checkpoint), dict[str, TensorHeader]()
    outside = inside.get(None, {})
    before = {name: tensor for name, tensor in outside.items() if names.is_input_side(name)}
    if place.is_first:
        found |= before
    for number, block in enumerate(blocks, start=place.first):
        for name, tensor in inside.get(block, {}).items():
            found[names.renumbered(name, number)] = tensor
    if place.is_last:
        found |= {name: tensor for name, tensor in outside.items() if name not in before}
    return replace(checkpoint, tensors=found)


def depths(checkpoint: Checkpoint, place: Place) -> dict[str, float]:
    """How deep in its slice each tensor lies, as `parameters.depths` has it for whole models."""
    numbers = {name: names.block(name) for name in checkpoint.tensors}
    own = {
        name: name if number is None else names.renumbered(name, number - place.first)
        for name, number in numbers.items()
    }
    found = parameters.depths(own.values())
    return {name: found[own_name] for name, own_name in own.items()}


def misfits(
    donor: Checkpoint, made: Checkpoint, place: Place, assembled: Collection[str] = ()
) -> tuple[Mismatch, ...]:
    """Hold what a slice makes against the model whose configuration says what will be loaded.

    A block fits where its tensors are those of some block of the donor. Tensors that are
    `assembled` row by row may have other numbers of rows.
    """
    expected = dict(cut(donor, range(0), place).tensors)
    templates, blocks = _by_block(donor), _by_block(made)
    shapes = {number: _shapes(block) for number, block in templates.items() if number is not None}
    for number in range(place.first, place.first + place.n_blocks):
        own = _shapes(blocks.get(number, {}))
        alike = next((n for n, found in shapes.items() if found == own), min(shapes))
        for name, tensor in templates[alike].items():
            renamed = names.renumbered(name, number)
            expected[renamed] = replace(tensor, name=renamed)
    return compare(replace(donor, tensors=expected), [made], assembled=assembled)


def _by_block(checkpoint: Checkpoint) -> Mapping[int | None, dict[str, TensorHeader]]:
    """The tensors of each block; under None those outside of the blocks."""
    found: defaultdict[int | None, dict[str, TensorHeader]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        found[names.block(name)][name] = tensor
    return found


def _shapes(block: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """By what a tensor is, in whichever block."""
    return {names.renumbered(name, 0): tensor.shape for name, tensor in block.items()}
