"""Second moments of the inputs of a model's Linears, G = E[x x^T]: their sums and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.calibration.hooks import InputSum
    from lewis_hub.calibration.model import Linear


INDEX = "grams.json"
VERSION = 1
WIDEST = 8192  # inputs of one matrix; longer inputs are split into parts with a matrix each
DIAGONAL = 1  # as `widest`: squares alone are stored
HELD_BYTES = 8 << 30  # of matrices in memory: a model that has more takes several passes
STEP = 128  # tokens multiplied at a time: BLAS splits longer sums among its threads


@dataclass(frozen=True)
class ModuleGram:
    """Where the second moments of one module's inputs are stored.

    Attributes:
        file: in the index's folder.
        tensor: in the file: (n_parts, width, width) float32.
        transposed: whether the module's weight is stored as (in, out), as in GPT-2's Conv1D.
        n_tokens: the number of tokens that the module saw.
    """

    file: str
    tensor: str
    transposed: bool
    n_tokens: int


@dataclass(frozen=True)
class GramFiles:
    """Second moments of one source.

    Attributes:
        facts: all that fixes them: source, calibration set, width.
        modules: module, as the checkpoint names it -> its matrix, in the model's order. A module
            that saw no token is left out, and so is one that the checkpoint stores otherwise.
        files: file -> SHA-256 in hexadecimal.
    """

    facts: Mapping[str, Any]
    modules: Mapping[str, ModuleGram]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """A digest over the matrices: equal digests, equal bytes."""
        told = json.dumps([dict(self.files), {m: asdict(g) for m, g in self.modules.items()}])
        return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class GramRequest:
    """Which second moments to store, and where.

    Attributes:
        folder: for their files; incomplete files of an earlier run are overwritten.
        widest: the most inputs of one matrix; DIAGONAL stores squares alone.
        facts: from `gram_facts`.
    """

    folder: Path
    widest: int
    facts: Mapping[str, Any]


def read_grams(request: GramRequest) -> GramFiles | None:
    """Read an earlier run's index; None if files are missing or were made of other facts."""
    try:
        read: Any = json.loads((request.folder / INDEX).read_text(encoding="utf-8"))
        modules = {module: ModuleGram(**gram) for module, gram in read["modules"].items()}
        grams = GramFiles(read["facts"], modules, read["files"])
        complete = all((request.folder / file).exists() for file in grams.files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return grams if complete and dict(grams.facts) == dict(request.facts) else None


def write_index(modules: Mapping[str, ModuleGram], request: GramRequest) -> GramFiles:
    """Write the index, which marks the files of all blocks as complete."""
    folder = request.folder
    files = {
        file: sha256_of(folder / file) for file in dict.fromkeys(g.file for g in modules.values())
    }
    grams = GramFiles(request.facts, modules, files)
    write_whole(folder / INDEX, json.dumps(asdict(grams), indent=1) + "\n")
    return grams


def write_grams(
    sums: Mapping[str, InputSum],
    modules: Mapping[str, Linear],
    stored_as: Mapping[str, str],
    folder: Path,
) -> dict[str, ModuleGram]:
    """Write a file for each block; modules whose weights the checkpoint stores otherwise have none.

    Args:
        sums: path -> the sum over its inputs; modules with equal inputs share one sum.
        modules: path -> module.
        stored_as: parameter -> its tensor in the checkpoint, from `weight_names`.
        folder: for the files.
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


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of safetensors atomically.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    new = path.with_name(path.name + ".new")
    try:
        save_file(dict(tensors), new)
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


def second_moments(rows: Tensor, widest: int) -> Tensor:
    """Sum x x^T over tokens: (n_tokens, in_features) -> (n_parts, width, width) float32."""
    from lewis_hub.calibration.summaries import sum_of_squares

    n = rows.shape[1]
    if widest == DIAGONAL:
        return sum_of_squares(rows).float().view(n, 1, 1)
    return cross_moments(rows, rows, widest)


def cross_moments(left: Tensor, right: Tensor, widest: int) -> Tensor:
    """Sum z x^T over tokens: twice (n_tokens, in_features) -> (n_parts, width, width) float32."""
    width = part_width(right.shape[1], widest)
    return _summed(_parts(left, width), _parts(right, width))


def residual_moments(left: Tensor, right: Tensor, widest: int) -> Tensor:
    """Sum d x^T over tokens: (n_tokens, n), (n_tokens, in_features) -> (n_parts, n, width)."""
    parts = _parts(right, part_width(right.shape[1], widest))
    return _summed([left.float()] * len(parts), parts)


def _parts(rows: Tensor, width: int) -> list[Tensor]:
    x = rows.float()
    return [x[:, start : start + width] for start in range(0, x.shape[1], width)]


def _summed(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = right[0].new_zeros(len(right), left[0].shape[1], right[0].shape[1])
    for start in range(0, len(right[0]), STEP):
        tokens = slice(start, start + STEP)
        for sums, z, x in zip(total, left, right, strict=True):
            sums.addmm_(z[tokens].T, x[tokens])
    return total


def shares_in_memory(modules: Mapping[str, Linear], widest: int) -> Iterator[dict[str, Linear]]:
    """Whole blocks, as many at a time as fit into HELD_BYTES with their matrices twice.

    The matrices of a batch exist beside the sums.
    """
    from lewis_hub.calibration.model import matrix

    blocks: dict[tuple[str | None, int | None], dict[str, Linear]] = {}
    for path, module in modules.items():
        blocks.setdefault((names.stack(path), names.block(path)), {})[path] = module
    share: dict[str, Linear] = {}
    held_bytes = 0
    for block in blocks.values():
        block_bytes = sum(2 * 4 * n_entries(matrix(m).shape[1], widest) for m in block.values())
        if share and held_bytes + block_bytes > HELD_BYTES:
            yield share
            share, held_bytes = {}, 0
        share, held_bytes = share | block, held_bytes + block_bytes
    yield share
