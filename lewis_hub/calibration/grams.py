"""Sums over the inputs of a model's Linears: squares, and second moments G = E[x x^T] in files."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lewis_hub.checkpoint import names
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of, write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lewis_hub.calibration.model import Linear

Value = TypeVar("Value")

INDEX = "grams.json"
VERSION = 2
WIDEST = 8192  # inputs of one matrix; longer inputs are split into parts with a matrix each
DIAGONAL = 1  # as `widest`: squares alone are stored
HELD_BYTES = 8 << 30  # of matrices in memory: a model that has more takes several passes
STEP = 128  # tokens multiplied at a time: BLAS splits longer sums among its threads
STRIP = 256  # rows of a symmetric sum that are multiplied at a time
ROWS_AT_ONCE = 512  # a squared copy of so many rows stays in the cache


@dataclass(frozen=True)
class InputSum:
    """A statistic of a module's inputs, summed over `n_tokens` tokens."""

    total: Tensor
    n_tokens: int

    def __add__(self, other: InputSum) -> InputSum:
        return InputSum(self.total + other.total, self.n_tokens + other.n_tokens)

    def mean(self) -> Tensor:
        """The mean over the tokens, in the sum's dtype."""
        return self.total / self.n_tokens


@dataclass(frozen=True)
class ModuleGram:
    """Where the second moments of one module's inputs are stored."""

    file: str
    tensor: str  # in the file: (n_parts, width, width) float32
    transposed: bool  # whether the module's weight is stored as (in, out), as in GPT-2's Conv1D
    n_tokens: int


@dataclass(frozen=True)
class GramFiles:
    """Second moments of one source.

    A module that saw no token is left out, and so is one that the checkpoint stores otherwise.
    """

    facts: Mapping[str, Any]  # all that fixes them: source, calibration set, width
    modules: Mapping[str, ModuleGram]  # as the checkpoint names them, in the model's order
    files: Mapping[str, str]  # file -> SHA-256 in hexadecimal

    @property
    def digest(self) -> str:
        """A digest over the matrices: equal digests, equal bytes."""
        written = asdict(self)
        told = json.dumps([written["files"], written["modules"]])
        return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class GramRequest:
    """Which second moments to store, and where."""

    folder: Path  # for their files; incomplete files of an earlier run are overwritten
    widest: int  # the most inputs of one matrix; DIAGONAL stores squares alone
    facts: Mapping[str, Any]  # from `Subject.gram_facts`


def read_grams(request: GramRequest) -> GramFiles | None:
    """Read an earlier run's index; None if files are missing or were made of other facts."""
    try:
        grams = TypeAdapter(GramFiles).validate_json((request.folder / INDEX).read_bytes())
    except (OSError, ValidationError):
        return None
    complete = all((request.folder / file).exists() for file in grams.files)
    return grams if complete and dict(grams.facts) == dict(request.facts) else None


def write_index(modules: Mapping[str, ModuleGram], request: GramRequest) -> GramFiles:
    """Write the index, which marks the files of all blocks as complete."""
    files = dict.fromkeys(gram.file for gram in modules.values())
    digests = {file: sha256_of(request.folder / file) for file in files}
    grams = GramFiles(request.facts, modules, digests)
    write_whole(request.folder / INDEX, json.dumps(asdict(grams), indent=1) + "\n")
    return grams


def write_grams(
    sums: Mapping[str, InputSum],
    modules: Mapping[str, Linear],
    stored_as: Mapping[str, str],
    folder: Path,
) -> dict[str, ModuleGram]:
    """Write a file for each block; modules whose weights the checkpoint stores otherwise have none.

    Modules with equal inputs share one of the `sums`, and one tensor.
    """
    from transformers.pytorch_utils import Conv1D

    grams: dict[str, ModuleGram] = {}
    files: dict[str, dict[str, Tensor]] = {}
    owners: dict[int, str] = {}
    for path, one in sums.items():
        if f"{path}.weight" not in stored_as:
            continue
        owner = owners.setdefault(id(one), path)
        file = f"{names.stack(owner)}.{names.block(owner)}.safetensors"
        if owner == path:
            files.setdefault(file, {})[path] = one.mean().cpu()
        module = names.module(stored_as[f"{path}.weight"])
        grams[module] = ModuleGram(file, owner, isinstance(modules[path], Conv1D), one.n_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        write_tensors(tensors, folder / file)
    return grams


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file of safetensors atomically, or raise an OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    new = path.with_name(path.name + ".new")
    try:
        save_file(dict(tensors), new, metadata)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        remedy = "Free some space, then run again."
        raise OutputError(str(path), f"it cannot be written ({error}).", remedy) from None


def part_width(n: int, widest: int) -> int:
    """The largest equal part of n inputs that has at most `widest` inputs."""
    return next(n // parts for parts in range(1, n + 1) if n % parts == 0 and n // parts <= widest)


def n_entries(n: int, widest: int) -> int:
    """The number of entries in the second moments of n inputs."""
    return n * part_width(n, widest)


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype of long sums on a device: float64, or float32 on MPS, which has no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def sum_of_squares(rows: Tensor) -> Tensor:
    """Sum squares over the first of two dimensions: float32 in a slice, widest over slices."""
    total = rows.new_zeros(rows.shape[1], dtype=widest_float(rows.device))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        total += rows[start : start + ROWS_AT_ONCE].float().square().sum(dim=0)
    return total


def second_moments(rows: Tensor, widest: int) -> Tensor:
    """Sum x x^T over tokens: (n_tokens, in_features) -> (n_parts, width, width) float32."""
    n = rows.shape[1]
    if widest == DIAGONAL:
        return sum_of_squares(rows).float().view(n, 1, 1)
    return mirrored(upper_moments(rows, widest))


def upper_moments(rows: Tensor, widest: int, total: Tensor | None = None) -> Tensor:
    """Do as `second_moments`, but for entries below the diagonal; add to `total` in place."""
    parts = rows.float().tensor_split(rows.shape[1] // part_width(rows.shape[1], widest), 1)
    if total is None:
        total = parts[0].new_zeros(len(parts), parts[0].shape[1], parts[0].shape[1])
    for start in range(0, len(rows), STEP):
        for sums, part in zip(total, parts, strict=True):
            _add_upper(sums, part[start : start + STEP])
    return total


def mirrored(total: Tensor) -> Tensor:
    """Copy the entries above the diagonal of each matrix to those below it, in place."""
    for sums in total:
        _mirror(sums)
    return total


def _add_upper(sums: Tensor, rows: Tensor) -> None:
    """Add the sum of x x^T to the entries above the diagonal, and to some below it."""
    for first in range(0, len(sums), STRIP):
        strip = slice(first, first + STRIP)
        sums[strip, first:].addmm_(rows[:, strip].T, rows[:, first:])


def _mirror(sums: Tensor) -> None:
    """Copy the entries above the diagonal to those below it."""
    for first in range(0, len(sums), STRIP):
        end = first + STRIP
        square = sums[first:end, first:end]
        square.copy_(square.triu() + square.triu(1).T)
        sums[end:, first:end] = sums[first:end, end:].T


def cross_moments(left: Tensor, right: Tensor, widest: int, total: Tensor | None = None) -> Tensor:
    """Sum z x^T over tokens: twice (n_tokens, in_features) -> (n_parts, width, width) float32.

    It is added to `total`, if that is given, in place.
    """
    n_parts = right.shape[1] // part_width(right.shape[1], widest)
    parts = right.float().tensor_split(n_parts, 1)
    return _summed(left.float().tensor_split(n_parts, 1), parts, total)


def residual_moments(
    left: Tensor, right: Tensor, widest: int, total: Tensor | None = None
) -> Tensor:
    """Sum d x^T over tokens: (n_tokens, n), (n_tokens, in_features) -> (n_parts, n, width).

    It is added to `total`, if that is given, in place.
    """
    n_parts = right.shape[1] // part_width(right.shape[1], widest)
    parts = right.float().tensor_split(n_parts, 1)
    return _summed([left.float()] * len(parts), parts, total)


def _summed(left: Sequence[Tensor], right: Sequence[Tensor], total: Tensor | None) -> Tensor:
    if total is None:
        total = right[0].new_zeros(len(right), left[0].shape[1], right[0].shape[1])
    for start in range(0, len(right[0]), STEP):
        tokens = slice(start, start + STEP)
        for sums, z, x in zip(total, left, right, strict=True):
            sums.addmm_(z[tokens].T, x[tokens])
    return total


def group_by_block(named: Iterable[tuple[str, Value]]) -> list[dict[str, Value]]:
    """Values by the name of a module or parameter, for each block of each list of blocks."""
    blocks: defaultdict[tuple[str | None, int | None], dict[str, Value]] = defaultdict(dict)
    for name, value in named:
        blocks[names.stack(name), names.block(name)][name] = value
    return list(blocks.values())


def shares_in_memory(
    modules: Mapping[str, Linear], stacks: Mapping[str, Tensor], widest: int
) -> Iterator[dict[str, Linear]]:
    """Whole blocks, as many at a time as fit into HELD_BYTES with their matrices twice.

    The matrices of a batch exist beside the sums. `stacks` of matrices are measured with the
    Linears of their block.
    """
    from lewis_hub.calibration.model import matrix

    of_stacks: defaultdict[tuple[str | None, int | None], int] = defaultdict(int)
    for name, stack in stacks.items():
        n_inputs = max(stack.shape[1:])
        of_stacks[names.stack(name), names.block(name)] += len(stack) * n_entries(n_inputs, widest)
    share: dict[str, Linear] = {}
    held_bytes = 0
    for block in group_by_block(modules.items()):
        path = next(iter(block))
        n_held = sum(n_entries(matrix(m).shape[1], widest) for m in block.values())
        block_bytes = 2 * 4 * (n_held + of_stacks[names.stack(path), names.block(path)])
        if share and held_bytes + block_bytes > HELD_BYTES:
            yield share
            share, held_bytes = {}, 0
        share, held_bytes = share | block, held_bytes + block_bytes
    yield share
