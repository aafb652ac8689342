"""Where pickled weights lie on this machine once they are safetensors.

In the cache of HF_HOME, by a digest of the files that they were made from: converting reads and
writes a whole model, and check, importance and a second merge need it again; a merge's own folder
is deleted with it. The same files under another name or commit are found as well.
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

NOTE = "converted.json"  # written last: a folder without it is not whole
NUMBERED = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")


def with_converted(source: Source, *, code: bool) -> Source:
    """The source with safetensors in the place of its pickles, where they are here already.

    Args:
        source: one whose weights are pickles; any other is handed back.
        code: whether its ``*.py`` files are carried along.
    """
    folder = converted_folder(source, code=code)
    if not source.is_pickled or not (folder / NOTE).exists():
        return source
    told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    written = tuple(SourceFile(**file) for file in told)
    pickles = {*weight_files(source), PICKLED_INDEX}
    others = tuple(file for file in source.files if file.path not in pickles)
    return replace(source, files=tuple(sorted((*others, *written), key=_path)), converted=folder)


def converted_folder(source: Source, *, code: bool) -> Path:
    """The folder that is, or would be, its place."""
    files = _beside(source, code=code) + [_file(source, path) for path in weight_files(source)]
    told = content_sha((file.path, file.digest) for file in files)
    return Path(constants.HF_HOME) / "lewis-hub" / "converted" / told.rpartition(":")[2][:40]


def pickles_of(source: Source) -> tuple[str, ...]:
    """The files of a source's pickled weights, in order.

    Raises:
        SourceError: one is missing.
    """
    found = weight_files(source)
    numbered = [match for path in found if (match := NUMBERED.fullmatch(path))]
    if numbered and len(numbered) != int(numbered[0][2]):
        problem = f"it has {len(numbered)} of {int(numbered[0][2])} files of pickled weights"
        raise SourceError(source.pinned, problem, "Use an intact copy.")
    return found


def begin(source: Source, files: Path, *, code: bool) -> Path:
    """A folder to convert into, with what lies beside the weights; `finish` or `abandon` it.

    Args:
        source: whose weights are pickles.
        files: where its files lie.
        code: whether its ``*.py`` files are carried along.

    Raises:
        OutputError: there is not enough room.
    """
    place = converted_folder(source, code=code)
    place.parent.mkdir(parents=True, exist_ok=True)
    needed = source.size_bytes(weight_files(source))
    remedy = "set HF_HOME to a folder on a larger disk"
    require_room(place.parent, needed, f"the converted weights of {source.pinned}", remedy)
    work = Path(mkdtemp(dir=place.parent, prefix=".work-"))
    for file in _beside(source, code=code):
        (work / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files / file.path, work / file.path)
    return work


def finish(source: Source, work: Path, written: Iterable[SourceFile], *, code: bool) -> None:
    """Give the folder its place; another run may have been first."""
    told: Sequence[Mapping[str, object]] = [vars(file) for file in written]
    write_whole(work / NOTE, json.dumps(told, indent=2) + "\n")
    place = converted_folder(source, code=code)
    with suppress(OSError):  # it is there: what this run made is the same
        work.rename(place)
    abandon(work)


def abandon(work: Path) -> None:
    """Take away what was begun."""
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
