"""Second moments of the inputs of a model's Linears, G = E[x x^T]: what some methods merge by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.progress import Advance, shared

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.calibration.hooks import InputSum
    from lewis_hub.calibration.measure import Subject
    from lewis_hub.calibration.meta_model import Weights
    from lewis_hub.calibration.model import Linear
    from lewis_hub.calibration.texts import CalibrationTokens


INDEX = "grams.json"


@dataclass(frozen=True)
class ModuleGram:
    """Where the second moments of one module's inputs are.

    Attributes:
        file: in the index's folder.
        tensor: in the file: (n_parts, width, width) float32.
        transposed: whether the module's weight lies as (in, out), as in GPT-2's Conv1D.
        n_tokens: that it saw.
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
        modules: module, as the checkpoint names it -> its matrix, in the model's order. One that
            saw no token is not in it, nor is one that the checkpoint does not hold as it is.
        files: file -> SHA-256 in hexadecimal.
    """

    facts: Mapping[str, Any]
    modules: Mapping[str, ModuleGram]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Over the matrices: equal digests, equal bytes."""
        told = json.dumps([dict(self.files), {m: asdict(g) for m, g in self.modules.items()}])
        return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """Second moments that somebody will look for.

    Attributes:
        folder: for their files; what is there, and is not whole, is written over.
        widest: inputs of one matrix; DIAGONAL keeps squares alone.
        facts: from `facts_of`.
    """

    folder: Path
    widest: int
    facts: Mapping[str, Any]


def read_grams(wanted: Wanted) -> GramFiles | None:
    """What an earlier run left in the folder; None where it is not whole, or of other facts."""
    try:
        told: Any = json.loads((wanted.folder / INDEX).read_text(encoding="utf-8"))
        modules = {module: ModuleGram(**gram) for module, gram in told["modules"].items()}
        found = GramFiles(told["facts"], modules, told["files"])
        whole = all((wanted.folder / file).exists() for file in found.files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if whole and dict(found.facts) == dict(wanted.facts) else None


def write_index(found: Mapping[str, ModuleGram], wanted: Wanted) -> GramFiles:
    """Say that all files are there; `found` has the modules of all blocks."""
    folder = wanted.folder
    files = {
        file: sha256_of(folder / file) for file in dict.fromkeys(g.file for g in found.values())
    }
    grams = GramFiles(wanted.facts, found, files)
    write_whole(folder / INDEX, json.dumps(asdict(grams), indent=1) + "\n")
    return grams


def write_blocks(
    sums: Mapping[str, InputSum],
    modules: Mapping[str, Linear],
    kept: Mapping[str, str],
    folder: Path,
) -> dict[str, ModuleGram]:
    """A file for each block, of the modules whose weights lie in the checkpoint as they are.

    Args:
        sums: path -> the sum over its inputs.
        modules: path -> module.
        kept: parameter -> its tensor in the checkpoint.
        folder: for the files.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, ModuleGram] = {}
    held: dict[str, dict[str, Tensor]] = {}
    owners: dict[int, str] = {}
    for path, one in sums.items():
        if f"{path}.weight" not in kept:
            continue
        owner = owners.setdefault(id(one), path)
        file = f"{names.stack(owner)}.{names.block(owner)}.safetensors"
        if owner == path:
            held.setdefault(file, {})[path] = one.mean().cpu()
        module = names.module(kept[f"{path}.weight"])
        found[module] = ModuleGram(file, owner, isinstance(modules[path], Conv1D), one.n_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in held.items():
        save_whole(tensors, folder / file)
    return found


def save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of safetensors so that a reader finds all of it or nothing.

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


VERSION = 1
WIDEST = 8192  # inputs of one matrix: longer ones are cut into parts that are taken by themselves
DIAGONAL = 1  # the same where squares alone are asked
HELD_BYTES = 8 << 30  # of matrices in memory: a model that has more takes several passes
STEP = 128  # tokens multiplied at a time: then threads split among inputs only, never a sum


def facts_of(subject: Subject, widest: int) -> dict[str, Any]:
    """All that fixes the second moments of a source on its one calibration set."""
    (own,) = subject.sets
    content = subject.commit_sha
    return {"version": VERSION, "source": content, "calibration": {**own.facts}, "widest": widest}


def gather_grams(subject: Subject, wanted: Wanted, device: str, advance: Advance) -> GramFiles:
    """Run a source's calibration texts through it, and keep the second moments of its Linears.

    Args:
        subject: with one calibration set; its model is gone on return.
        wanted: what is left, and where.
        device: as torch names it.
        advance: called with the number of tokens done, once for all passes.

    Raises:
        CalibrationModelError: the source cannot be loaded or measured.
        EmptyCalibrationError: no token counts.
    """
    [own] = subject.sets
    found = subject.measured(
        lambda weights: _by_block(weights, own.tokens, wanted, device, advance),
        lambda: _whole(subject, wanted, device, advance),
    )
    return write_index(found, wanted)


def _whole(
    subject: Subject, wanted: Wanted, device: str, advance: Advance
) -> dict[str, ModuleGram]:
    import torch

    from lewis_hub.calibration.determinism import threads, whole_shares
    from lewis_hub.calibration.fused_experts import stored_names
    from lewis_hub.calibration.hooks import block_linears, check_tokens_fit, input_sums
    from lewis_hub.calibration.model import load_model
    from lewis_hub.calibration.texts import batches

    name, tokens = subject.source, subject.sets[0].tokens
    model = load_model(subject.folder, device, name)
    check_tokens_fit(model, name, tokens)
    kept = stored_names(model)
    modules = {
        path: module
        for path, module in block_linears(model, name).items()
        if f"{path}.weight" in kept
    }
    shares = list(_shares(modules, wanted.widest))
    advance = shared(advance, len(shares))
    summed = partial(second_moments, widest=wanted.widest)
    found: dict[str, ModuleGram] = {}
    widths = {n_inputs(module) for module in modules.values()}
    with threads(whole_shares(widths, torch.get_num_threads())):
        for share in shares:
            sums = input_sums(model, name, share, batches(tokens), summed, advance)
            found |= write_blocks(sums, modules, kept, wanted.folder)
    return found


def _by_block(
    weights: Weights,
    tokens: CalibrationTokens,
    wanted: Wanted,
    device: str,
    advance: Advance,
) -> dict[str, ModuleGram]:
    """The matrices of one block at a time, in one pass of the texts."""
    from lewis_hub.calibration.blockwise import Visit, visited
    from lewis_hub.calibration.fused_experts import stored_names
    from lewis_hub.calibration.meta_model import skeleton

    def write(visits: Iterator[Visit]) -> dict[str, ModuleGram]:
        found: dict[str, ModuleGram] = {}
        for visit in visits:
            [[sums]] = visit.sums
            found |= write_blocks(sums, visit.modules, kept, wanted.folder)
        return found

    summed = [partial(second_moments, widest=wanted.widest)]
    made = skeleton(weights, device)
    kept = stored_names(made.model)
    return visited(made, [tokens], summed, advance, write, products=False)


def n_inputs(module: Linear) -> int:
    """The number of input features."""
    from lewis_hub.calibration.model import matrix

    return matrix(module).shape[1]


def part_width(n: int, widest: int) -> int:
    """The longest of the equal parts, at most `widest` long, that n inputs can be cut into."""
    return next(n // parts for parts in range(1, n + 1) if n % parts == 0 and n // parts <= widest)


def second_moments(rows: Tensor, widest: int) -> Tensor:
    """Sum x x^T over tokens: (n_tokens, in_features) -> (n_parts, width, width) float32."""
    from lewis_hub.calibration.profile import sum_of_squares

    n = rows.shape[1]
    if widest == DIAGONAL:
        return sum_of_squares(rows).float().view(n, 1, 1)
    return products(rows, rows, widest)


def products(left: Tensor, right: Tensor, widest: int) -> Tensor:
    """Sum z x^T over tokens: twice (n_tokens, in_features) -> (n_parts, width, width) float32."""
    width = part_width(right.shape[1], widest)
    return _summed(_parts(left, width), _parts(right, width))


def outer_products(left: Tensor, right: Tensor, widest: int) -> Tensor:
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


def _shares(modules: Mapping[str, Linear], widest: int) -> Iterator[dict[str, Linear]]:
    """Whole blocks, as many at a time as their matrices fit; twice, for a batch has its own."""
    blocks: dict[tuple[str | None, int | None], dict[str, Linear]] = {}
    for path, module in modules.items():
        blocks.setdefault((names.stack(path), names.block(path)), {})[path] = module
    share: dict[str, Linear] = {}
    held_bytes = 0
    for block in blocks.values():
        block_bytes = sum(2 * 4 * n_entries(n_inputs(m), widest) for m in block.values())
        if share and held_bytes + block_bytes > HELD_BYTES:
            yield share
            share, held_bytes = {}, 0
        share, held_bytes = share | block, held_bytes + block_bytes
    yield share


def n_entries(n: int, widest: int) -> int:
    """How many numbers the second moments of n inputs are."""
    return n * part_width(n, widest)
