"""Cache of pickled weights that were converted to safetensors, below HF_HOME.

A conversion reads and writes a whole model, and check, importance and later merges need the
result. It is stored under a digest of the pickled files, so the same files of another repo or
commit use it too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import constants

from lewis_hub.errors import SourceError
from lewis_hub.files import require_room, write_whole
from lewis_hub.hub.fetch import CODE_FILES, SIDECAR_FILES, weight_files
from lewis_hub.hub.resolve import content_sha
from lewis_hub.hub.source import PICKLED_INDEX, Source, SourceFile

NOTE = "converted.json"  # written last: a folder without it is incomplete
NUMBERED = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")


def with_converted(source: Source, *, code: bool) -> Source:
    """The source with safetensors in place of its pickles, if they were converted before.

    Args:
        source: a source without pickles is returned as it is.
        code: whether its ``*.py`` files are included.
    """
    folder = converted_folder(source, code=code)
    if not source.is_pickled or not (folder / NOTE).exists():
        return source
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    written = tuple(SourceFile(**file) for file in note)
    pickles = {*weight_files(source), PICKLED_INDEX}
    others = tuple(file for file in source.files if file.path not in pickles)
    return replace(source, files=tuple(sorted((*others, *written), key=_path)), converted=folder)


def converted_folder(source: Source, *, code: bool) -> Path:
    """The folder of the converted source; it may not exist yet."""
    files = _beside(source, code=code) + [_file(source, path) for path in weight_files(source)]
    digest = content_sha((file.path, file.digest) for file in files)
    return Path(constants.HF_HOME) / "lewis-hub" / "converted" / digest.rpartition(":")[2][:40]


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


def begin_conversion(source: Source, files: Path, *, code: bool) -> Path:
    """A folder to convert into, with all files but the weights.

    `finish_conversion` or `abandon_conversion` has to follow.

    Args:
        source: its weights are pickles.
        files: the folder with its files.
        code: whether its ``*.py`` files are included.

    Raises:
        OutputError: there is not enough room.
    """
    folder = converted_folder(source, code=code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = source.size_bytes(weight_files(source))
    remedy = "set HF_HOME to a folder on a larger disk"
    require_room(folder.parent, needed, f"the converted weights of {source.pinned}", remedy)
    work = Path(mkdtemp(dir=folder.parent, prefix=".work-"))
    for file in _beside(source, code=code):
        (work / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files / file.path, work / file.path)
    return work


def finish_conversion(
    source: Source, work: Path, written: Iterable[SourceFile], *, code: bool
) -> None:
    """Move the folder into the cache; another run may have been faster."""
    note: Sequence[Mapping[str, object]] = [vars(file) for file in written]
    write_whole(work / NOTE, json.dumps(note, indent=2) + "\n")
    folder = converted_folder(source, code=code)
    with suppress(OSError):  # it exists: the other run made the same files
        work.rename(folder)
    abandon_conversion(work)


def abandon_conversion(work: Path) -> None:
    """Delete the folder of an unfinished conversion."""
    shutil.rmtree(work, ignore_errors=True)


def _beside(source: Source, *, code: bool) -> list[SourceFile]:
    found = source.matching((*SIDECAR_FILES, *(CODE_FILES if code else ())))
    return [file for file in found if file.path != PICKLED_INDEX]


def _file(source: Source, path: str) -> SourceFile:
    file = source.file(path)
    assert file
    return file


def _path(file: SourceFile) -> str:
    return file.path
