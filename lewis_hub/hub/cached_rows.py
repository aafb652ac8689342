"""Rows in the cache of `datasets`, which compares neither them nor what they were read from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from lewis_hub.errors import SourceError
from lewis_hub.files import write_whole
from lewis_hub.hub.digests import content_sha, digests_of
from lewis_hub.hub.source import RESTORE, local_reading, state_of

DATASET_INFO = "dataset_info.json"  # of `datasets`, beside the rows
ROWS_NOTE = "lewis-hub-digests.json"  # beside them, too
COMPUTED = re.compile("cache-[0-9a-f]{16}[._]")  # its names; rows of `me/cache-a` are no such file


def require_as_written(folder: Path) -> None:
    """Refuse rows of the cache that changed since they were read for the first time.

    `datasets` maps them into memory.

    Raises:
        SourceError: they did; the cache does not have them any more.
    """
    note, found = folder / ROWS_NOTE, _digests(folder)
    stored = note.read_bytes() if note.is_file() else b""
    if not stored:
        with suppress(OSError):  # the next run stores it
            write_whole(note, found.decode())
    elif stored != found:
        shutil.rmtree(folder, ignore_errors=True)
        problem = "these rows in the cache of `datasets` are damaged"
        raise SourceError(str(folder), problem, "Run the same command again: it makes them again.")


def _digests(folder: Path) -> bytes:
    """The digests of the files in a folder of the cache, but for what is computed from them."""
    names = ("*.arrow", DATASET_INFO)
    files = sorted(path for name in names for path in folder.glob(name))
    files = [path for path in files if not COMPUTED.match(path.name)]
    named = zip((path.name for path in files), digests_of(files), strict=True)
    return json.dumps(dict(named), indent=2).encode()


@contextmanager
def computed_anew() -> Iterator[None]:
    """Inside the block `datasets` does not cache what functions compute of rows.

    It names that by the names of the functions in a module, so that an edited one gives the old
    rows, and it compares nothing.
    """
    import datasets

    was_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_caching()


def name_by_content() -> None:
    """Let `datasets` name the rows of local files by the contents of the files.

    It names them by the times of the files, which a copy may keep, or by what a card says of them.
    """
    builders: Any = import_module("datasets.builder").DatasetBuilder
    build = builders._build_cache_dir

    def build_by_content(self: Any) -> str:
        folder = str(build(self))
        files = _local_files(self)
        return f"{folder}-{_content(files)}" if files else folder

    builders._build_cache_dir = build_by_content


@contextmanager
def of_named_files(builder: Any) -> Iterator[None]:
    """Inside the block a builder of `datasets` makes rows of its local files.

    Its cache folder was named by their contents when the builder was made.

    Raises:
        SourceError: a file changed since then, or meanwhile; the cache does not have the rows.
    """
    files = _local_files(builder)
    before = _states(files)
    yield
    written = [
        path for path, old, new in zip(files, before, _states(files), strict=True) if old != new
    ]
    if files and (written or not builder.cache_dir.endswith(_content(files))):
        shutil.rmtree(builder.cache_dir, ignore_errors=True)
        changed = (written or files)[0]
        problem = f"`{changed.name}` changed while it was read"
        raise SourceError(str(changed.parent), problem, RESTORE)


def _local_files(builder: Any) -> list[Path]:
    every = chain.from_iterable((builder.config.data_files or {}).values())
    paths = {Path(file.removeprefix("file://")) for file in every}
    return sorted(path for path in paths if path.is_file())


def _content(files: Sequence[Path]) -> str:
    """The first 32 digits of a digest of files: their paths and contents."""
    found = content_sha(zip(map(str, files), digests_of(files), strict=True))
    return found.rpartition(":")[2][:32]


def _states(files: Iterable[Path]) -> list[str]:
    found = []
    for path in files:
        with local_reading(str(path.parent)):
            found.append(state_of(path))
    return found
