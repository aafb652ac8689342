"""Cache of pickled weights that were converted to safetensors, below HF_HOME.

A conversion reads and writes a whole model, and check, importance and later merges need the
result. It is stored under a digest of the pickled files, so the same files of another repo or
commit use it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants

from lewis_hub.errors import SourceError
from lewis_hub.files import require_room, size_of, write_whole
from lewis_hub.hub.cache import damaged_files
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.hub.digests import content_sha
from lewis_hub.hub.fetch import CODE_FILES, SIDECAR_FILES, read_pinned, weight_files
from lewis_hub.hub.source import PICKLED_INDEX, Source, SourceFile

NOTE = "converted.json"  # written last: a folder without it is incomplete
NUMBERED = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")


def with_converted(source: Source, *, code: bool) -> Source:
    """The source with safetensors in place of its pickles, if the cache has them undamaged.

    `code` says whether its ``*.py`` files are included.
    """
    folder = _folder(source, code=code)
    written = _noted(folder) if source.is_pickled else []
    is_whole = written and _is_intact(folder, [*written, *_beside(source, code=code)])
    return _having(source, folder, written) if is_whole else source


def _having(source: Source, folder: Path, written: Iterable[SourceFile]) -> Source:
    pickles = {*weight_files(source), PICKLED_INDEX}
    files = [file for file in source.files if file.path not in pickles]
    files = sorted([*files, *written], key=lambda file: file.path)
    return replace(source, files=tuple(files), converted=folder)


def _noted(folder: Path) -> list[SourceFile]:
    """The weights that a conversion wrote; none if its note is missing or damaged."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return [SourceFile(**written) for written in note]
    return []


def _is_intact(folder: Path, files: Sequence[SourceFile]) -> bool:
    sizes = all(size_of(folder / file.path) == file.size_bytes for file in files)
    return sizes and not damaged_files(folder, files)


def pickles_of(source: Source) -> tuple[str, ...]:
    """The files of a source's pickled weights, in order.

    Raises:
        SourceError: a file is missing.
    """
    found = weight_files(source)
    numbered = [match for path in found if (match := NUMBERED.fullmatch(path))]
    if numbered and len(numbered) != int(numbered[0][2]):
        problem = f"it has {len(numbered)} of {int(numbered[0][2])} files of pickled weights"
        raise SourceError(source.pinned, problem, "Use an intact copy.")
    return found


def store_converted(
    source: Source, convert: Callable[[Path], Iterable[SourceFile]], *, code: bool
) -> Source:
    """Convert the weights of a source into the cache; returns the source with them.

    The source is fetched; `convert` writes the weights into a folder that has all other files.

    Raises:
        OutputError: there is not enough room.
        SourceError: a local file changed since it was pinned.
    """
    folder = _folder(source, code=code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = source.size_bytes(weight_files(source))
    remedy = "set HF_HOME to a folder on a larger disk"
    require_room(folder.parent, needed, f"the converted weights of {source.pinned}", remedy)
    with TemporaryDirectory(dir=folder.parent, prefix=".work-") as scratch:
        work = Path(scratch) / "model"
        for file in _beside(source, code=code):
            (work / file.path).parent.mkdir(parents=True, exist_ok=True)
            (work / file.path).write_bytes(read_pinned(source, file))
        written = list(convert(work))
        require_unchanged(source)
        write_whole(work / NOTE, json.dumps([*map(vars, written)], indent=2) + "\n")
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if not with_converted(source, code=code).converted:  # else another run was faster
                _replace_files(work, folder)
    return _having(source, folder, written)


def _replace_files(new: Path, folder: Path) -> None:
    """Replace the files of a damaged folder one by one, as other runs may read it."""
    for path in [path for path in sorted(new.rglob("*")) if path.is_file()]:
        target = folder / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _folder(source: Source, *, code: bool) -> Path:
    """The folder of the converted source; it may not exist yet."""
    weights = weight_files(source)
    files = _beside(source, code=code) + [file for file in source.files if file.path in weights]
    digest = content_sha((file.path, file.digest) for file in files)
    return Path(constants.HF_HOME) / "lewis-hub" / "converted" / digest.rpartition(":")[2][:40]


def _beside(source: Source, *, code: bool) -> list[SourceFile]:
    found = source.matching((*SIDECAR_FILES, *(CODE_FILES if code else ())))
    return [file for file in found if file.path != PICKLED_INDEX]
