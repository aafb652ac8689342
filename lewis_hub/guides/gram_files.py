"""Second moments of one source on disk.

G = E[x x^T] over the tokens that count, a file of safetensors a block. Modules that are handed the
same inputs (q, k and v; gate and up) share one matrix. An index beside the files says which module
has which; it is written last, so that what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.guides.blocks import Linear
    from lewis_hub.guides.recording import InputSum

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
