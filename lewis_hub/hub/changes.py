"""Local sources that are written while a run reads them: they are refused.

The files of a repo are compared when they are fetched into the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lewis_hub.errors import LewisHubError, SourceError
from lewis_hub.files import is_hidden
from lewis_hub.hub.cache import damaged_files
from lewis_hub.hub.digests import digests_of
from lewis_hub.hub.fetch import NEVER, READ_WHOLE
from lewis_hub.hub.source import (
    FETCH_AGAIN,
    MODULES,
    PICKLED,
    RESTORE,
    Source,
    SourceFile,
    local_reading,
    state_of,
)

WEIGHTS = ("*.safetensors",)
CARD = "README.md"  # its author may write it during a run
MODEL_FILES = (
    *(pattern for pattern in READ_WHOLE if pattern != CARD),
    *("*vocab*", "*.codes", "dict.txt"),  # of tokenizers that are written in Python
    *WEIGHTS,
)
WRITE_LATER = "Run again when nothing writes it."


def require_unchanged(source: Source) -> None:
    """Refuse a local source whose files are no longer those that were pinned.

    A file that was changed and then restored has other times than before. So has one that was
    linked, as a backup does.

    Raises:
        SourceError: a file has another content or other times, or is missing.
    """
    files = _files(source)
    try:
        found = digests_of([*files])
        states = [*map(state_of, files)]
    except OSError as error:
        problem = f"a file of it cannot be read any more: {error.strerror}"
        raise SourceError(source.pinned, problem, RESTORE) from None
    for file, digest, state in zip(files.values(), found, states, strict=True):
        if digest != file.digest:
            problem = f"`{file.path}` changed while it was read"
            raise SourceError(source.pinned, problem, RESTORE)
        if state != file.state:
            problem = f"`{file.path}` was written or linked while it was read"
            raise SourceError(source.pinned, problem, WRITE_LATER)


def is_unchanged(source: Source, before: Source, own: Sequence[Path]) -> bool:
    """Whether a source that was pinned again is what a run reads of it as it was pinned before.

    Of local files the states are compared, too: one may have been changed, read and restored.
    `own` are resolved paths of folders that the run writes, which may be inside of a source.
    """
    if source.folder is None:
        return source.commit_sha == before.commit_sha

    def seen(one: Source) -> dict[Path, tuple[str, str]]:
        return {
            path: (file.digest, file.state)
            for path, file in _files(one).items()
            if not any(path.resolve().is_relative_to(folder) for folder in own)
        }

    return seen(source) == seen(before)


def local_states(sources: Iterable[Source]) -> dict[str, str]:
    """The size and times of each file of local sources that a run reads, by path.

    Raises:
        SourceError: a file is missing.
    """
    states = {}
    for source in sources:
        for path in _files(source):
            with local_reading(source.pinned):
                states[str(path.resolve())] = state_of(path)
    return states


@contextmanager
def unchanged(sources: Iterable[Source]) -> Iterator[Mapping[str, str]]:
    """Yield the states of local sources, and refuse at the end what was written meanwhile.

    Raises:
        SourceError: as `require_unchanged`.
    """
    sources = tuple(sources)
    yield local_states(sources)
    for source in sources:
        require_unchanged(source)


@contextmanager
def telling_changes(sources: Iterable[Source]) -> Iterator[None]:
    """Inside the block an error of the arithmetic tells that weights changed, if they did.

    Raises:
        SourceError: a file has another content than was pinned, or is missing.
    """
    try:
        yield
    except (LewisHubError, OSError):
        raise
    except Exception:
        for source in sources:
            require_unchanged(source)
            if source.local_folder is None:
                for file in damaged_files(source.snapshot, source.matching(WEIGHTS)):
                    problem = f"`{file.path}` changed while it was read"
                    raise SourceError(source.pinned, problem, FETCH_AGAIN) from None
        raise


def _files(source: Source) -> dict[Path, SourceFile]:
    """The files that a run reads and that others may change: none of the cache."""
    if source.folder is None or source.converted:
        return {}
    if source.repo_type == "dataset":
        root = source.folder if source.folder.is_dir() else source.folder.parent
        return {root / file.path: file for file in source.files}
    read = (*MODEL_FILES, *(PICKLED if source.is_pickled else ()))
    files = source.matching(read)
    if source.file(MODULES):
        unread = (CARD, *NEVER)
        others = (file for file in source.files if not is_hidden(PurePosixPath(file.path)))
        files = (*files, *(file for file in others if not file.path.endswith(unread)))
    return {source.folder / file.path: file for file in files}
