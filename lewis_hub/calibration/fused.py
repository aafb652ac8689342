"""Second moments of experts that are fused into one parameter, by the tensors of the checkpoint.

transformers multiplies a matrix of such a stack with the tokens that are routed to an expert. The
checkpoint may store each expert by itself, or all in one tensor, perhaps in another orientation. To
find which matrix a stored tensor is part of, and on which side its inputs are, transformers stores
numbers in place of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lewis_hub.calibration.grams import InputSum, ModuleGram, part_width, write_tensors
from lewis_hub.calibration.hooks import ProductRecorder, require_finite
from lewis_hub.calibration.meta_model import as_stored
from lewis_hub.checkpoint import names

NONE = -1  # of a matrix that no token was multiplied with


@dataclass(frozen=True)
class FusedMoments:
    """Second moments of a stored tensor's inputs, of the tokens that reached its experts."""

    key: str  # equal for tensors with the same moments
    gram: Tensor  # (n_parts, width, width) float32; of several experts (n_experts, ...), 0 without
    # tokens
    transposed: bool  # whether matrices are stored as (in, out)
    n_tokens: int


def fused_moments(
    model: PreTrainedModel, name: str, recorder: ProductRecorder, widest: int
) -> dict[str, FusedMoments]:
    """The moments of tensors of the checkpoint that stacks, or single matrices, are stored as.

    `recorder` saw the parameters of one or more blocks in `model`, and summed second moments;
    `name` is the source's, for messages. Left out are parameters of which no whole matrix was
    multiplied with tokens, and tensors of experts that no token reached.

    Raises:
        CalibrationModelError: the moments are not finite.
    """
    require_finite({path: one for (path, *_), one in recorder.sums.items()}, name)
    found: dict[str, FusedMoments] = {}
    for path, parameter in recorder.used.items():
        shape = parameter.shape
        if len(shape) not in (2, 3) or not parameter.is_contiguous():
            continue
        sums, transposed = _by_matrix(path, parameter.detach().view(-1, *shape[-2:]), recorder)
        if transposed is None:
            continue
        numbers = [NONE if one is None else number for number, one in enumerate(sums)]
        owners = torch.tensor(numbers, dtype=torch.int32)[:, None, None].expand(-1, *shape[-2:])
        inputs = torch.arange(shape[-2 if transposed else -1], dtype=torch.int32)
        along = (inputs[:, None] if transposed else inputs).expand(shape)
        of_owners = as_stored(model, {path: owners if len(shape) == 3 else owners[0]})
        of_inputs = as_stored(model, {path: along})
        for tensor, owner in of_owners.items():
            if one := _of_stored(path, sums, owner, of_inputs[tensor], widest):
                found[tensor] = one
    return found


def _by_matrix(
    path: str, stack: Tensor, recorder: ProductRecorder
) -> tuple[list[InputSum | None], bool | None]:
    """The sums of each matrix of a stack, and whether it is (in, out); None if that is unknown."""
    n_matrices, *shape = stack.shape
    sums: list[InputSum | None] = [None] * n_matrices
    sides: set[bool] = set()
    for (of, offset, view, stride), one in recorder.sums.items():
        if of != path:
            continue
        number, rest = divmod(offset, stack.stride(0))
        matrix = stack[number]
        is_plain = (view, stride) == (matrix.shape, matrix.stride())
        if rest or not (is_plain or (view, stride) == (matrix.mT.shape, matrix.mT.stride())):
            return sums, None
        sums[number] = one
        sides.add(is_plain)
    return sums, sides.pop() if len(sides) == 1 else None


def _of_stored(
    path: str, sums: Sequence[InputSum | None], owner: Tensor, inputs: Tensor, widest: int
) -> FusedMoments | None:
    """The moments of a stored tensor, whose entries are numbers of a matrix and of an input."""
    if owner.dim() not in (2, 3):
        return None
    matrices, along = owner.view(-1, *owner.shape[-2:]), inputs.view(-1, *owner.shape[-2:])
    numbers = [int(one[0, 0]) for one in matrices]
    if any(bool((one != n).any()) for one, n in zip(matrices, numbers, strict=True)):
        return None
    n_rows, n_columns = owner.shape[-2:]
    is_plain = bool((along == torch.arange(n_columns)).all())
    if not is_plain and not bool((along == torch.arange(n_rows)[:, None]).all()):
        return None
    n_inputs = n_columns if is_plain else n_rows
    reached = [one for n in numbers if n != NONE and (one := sums[n])]
    if not reached:
        return None
    width = part_width(n_inputs, widest)
    gram = torch.zeros(len(numbers), n_inputs // width, width, width)
    for place, number in enumerate(numbers):
        if number != NONE and (one := sums[number]):
            gram[place] = one.mean()
    key = f"{path}.{numbers[0]}" if owner.dim() == 2 else path
    n_tokens = sum(one.n_tokens for one in reached)
    return FusedMoments(key, gram[0] if owner.dim() == 2 else gram, not is_plain, n_tokens)


def write_fused(found: Mapping[str, FusedMoments], folder: Path) -> dict[str, ModuleGram]:
    """Write a file for each block; equal moments are written once."""
    files: dict[str, dict[str, Tensor]] = {}
    stored: dict[str, ModuleGram] = {}
    for tensor, one in found.items():
        file = f"{names.stack(one.key)}.{names.block(one.key)}.fused.safetensors"
        files.setdefault(file, {})[one.key] = one.gram
        stored[names.module(tensor)] = ModuleGram(file, one.key, one.transposed, one.n_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        write_tensors(tensors, folder / file)
    return stored
