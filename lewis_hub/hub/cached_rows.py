"""Rows in the cache of `datasets`, which compares neither them nor what they were read from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from lewis_hub.errors import SourceError
from lewis_hub.files import write_whole
from lewis_hub.hub.digests import digests_of
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


@cache
def name_by_content() -> None:
    """Let `datasets` name the rows of local files by the digests of the files.

    It names them by the times of the files, which a copy may keep.
    """
    module: Any = import_module("datasets.data_files")
    describe = module._get_single_origin_metadata

    def describe_content(file: str, *args: Any, **options: Any) -> Any:
        path = _local_path(file)
        return (digests_of([path])[0],) if path.is_file() else describe(file, *args, **options)

    module._get_single_origin_metadata = describe_content


@contextmanager
def of_named_files(builder: Any) -> Iterator[None]:
    """Inside the block a builder of `datasets` makes rows of local files, which must not change.

    Raises:
        SourceError: one did since the builder was made; the cache does not have its rows.
    """
    every = (builder.config.data_files or {}).values()
    files = sorted({path for named in every for path in map(_local_path, named) if path.is_file()})
    # it describes files, too, that the builder leaves out later
    known = {
        digest for named in every for described in named.origin_metadata for digest in described
    }
    before = _states(files)
    yield
    for path, digest, old, new in zip(
        files, digests_of(files), before, _states(files), strict=True
    ):
        if digest not in known or new != old:
            shutil.rmtree(builder.cache_dir, ignore_errors=True)
            problem = f"`{path.name}` changed while it was read"
            raise SourceError(str(path.parent), problem, RESTORE)


def _local_path(file: str) -> Path:
    return Path(file.removeprefix("file://"))


def _states(files: Iterable[Path]) -> list[str]:
    found = []
    for path in files:
        with local_reading(str(path.parent)):
            found.append(state_of(path))
    return found
