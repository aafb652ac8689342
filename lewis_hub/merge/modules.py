"""The modules of a sentence-transformers model behind its transformer: pooling, dense layers.

`modules.json` lists a folder for each, which holds its settings and the weights of a trained one.
The merge has the donor's. Weights of modules are not merged: all models must have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lewis_hub.documents import read_json
from lewis_hub.errors import SourceError
from lewis_hub.hub.source import MODULE_FOLDER, MODULES, SINGLE, Source

DAMAGED = "The file is damaged: use an intact copy of the model."
PICKLED = "pytorch_model.bin"
SETTINGS = "config.json"
READ = (".json", ".txt", ".safetensors")  # endings of files that modules read
ALONE = "Merge models whose modules have a config.json and a model.safetensors only, such as Dense."
UNMERGED = "Merge models that share these layers, or their transformers without `modules.json`."

Read = Callable[[Source, str], bytes | None]  # the content of a source's file, if it has it


def module_weights(source: Source, listed: bytes | None) -> tuple[str, ...]:
    """The weights of the modules that a `modules.json` lists; `listed` is its content.

    Raises:
        SourceError: it is no list of modules, or names a folder that is not carried.
    """
    if listed is None:
        return ()
    files = (f"{folder}/{SINGLE}" for folder in _folders(source, listed))
    return tuple(path for path in files if source.file(path))


def module_problems(models: Sequence[Source], read: Read) -> list[str]:
    """Why the modules of whole models do not fit those of the first, whose ones the merge has."""
    first, *others = models
    listed = read(first, MODULES)
    if listed is None:
        return []
    problems = []
    for folder in _folders(first, listed):
        path, pickled = f"{folder}/{SINGLE}", f"{folder}/{PICKLED}"
        if first.file(path) is None and first.file(pickled):
            problems.append(
                f"{first.name}: the weights of its module {folder} are in {pickled} only, which is "
                "not read. Load it in sentence-transformers and save it again."
            )
        problems += [
            f"{other.name} and {first.name} have different weights in {path}, which are not "
            f"merged. {UNMERGED}"
            for other in others
            if other.file(path) and not _is_same(path, first, other, read)
        ]
    return problems


def _folders(source: Source, listed: bytes) -> Iterator[str]:
    """The folders of the modules, without that of the transformer, which is the model's own."""
    try:
        found = read_json(listed)
        folders = [str(module["path"]) for module in found]
    except (ValueError, TypeError, KeyError) as error:
        problem = f"`{MODULES}` is no list of modules: {error}"
        raise SourceError(source.pinned, problem, DAMAGED) from None
    left = _not_carried(source)
    for folder in dict.fromkeys(filter(None, folders)):  # a list of 16 MB may repeat one
        if not MODULE_FOLDER.fullmatch(folder):
            problem = f"`{MODULES}` names the folder {folder!r}, whose files are not carried"
            remedy = "Load it in sentence-transformers and save it again: it writes `1_Pooling`."
            raise SourceError(source.pinned, problem, remedy)
        if folder in left:
            problem = f"its module {folder} needs {left[folder]}, which is not carried"
            raise SourceError(source.pinned, problem, ALONE)
        yield folder


def _not_carried(source: Source) -> dict[str, str]:
    """Folder -> its first file of other settings, a vocabulary, or a module as in a router."""
    found: dict[str, str] = {}
    for path in (file.path for file in source.files):
        folder, _, name = path.partition("/")
        if name.endswith(READ) and name not in (SETTINGS, SINGLE):
            found.setdefault(folder, path)
    return found


def _is_same(path: str, first: Source, other: Source, read: Read) -> bool:
    """Whether two models have the same file, whose digests may be of two kinds."""
    digests = [file.digest for one in (first, other) if (file := one.file(path))]
    return len(set(digests)) == 1 or read(first, path) == read(other, path)
