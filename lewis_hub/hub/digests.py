"""Digests of files; those of large files are stored, so that each is read once."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from lewis_hub.display import Advance, Progress
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.hub.source import digest_like

N_HASHING_THREADS = 2
REMEMBERED_BYTES = 1 << 20  # hashing a smaller file is as fast as reading its stored digest
LONG_BYTES = 1 << 30  # hashing fewer takes a few seconds, and needs no progress
SETTLED_NS = 2_000_000_000  # longer than the tick of any file system's clock
SHA256 = re.compile(r"[0-9a-f]{64}")


def digests_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file as `sha256:<hex>`, in the order given."""
    with ThreadPoolExecutor(N_HASHING_THREADS) as pool:
        return [f"sha256:{found}" for found in pool.map(_sha256, paths)]


def remember_digests(paths: Sequence[Path], progress: Progress) -> None:
    """Hash files whose digests are not stored yet, with progress, if they are large."""
    now, new = time.time_ns(), dict[Path, int]()
    for path in paths:
        seen = path.stat()
        if _is_remembered(seen, now) and not _known(_note(path, seen)):
            new[path] = seen.st_size
    if (n_bytes := sum(new.values())) < LONG_BYTES:
        return
    with (
        progress.stage("Reading local files", n_bytes, "bytes") as advance,
        ThreadPoolExecutor(N_HASHING_THREADS) as pool,
    ):
        try:
            list(pool.map(partial(_sha256, advance=advance), new))
        finally:
            pool.shutdown(cancel_futures=True)


def git_sha1_of(path: Path) -> str:
    """The id that git gives a file, as `git-sha1:<hex>`; for small files."""
    return digest_like("git-sha1:", path.read_bytes())


def content_sha(digests: Iterable[tuple[str, str]]) -> str:
    """One digest of (path, digest) pairs; it depends neither on their order nor on the folder."""
    total = hashlib.sha256()
    for path, digest in sorted(digests):
        total.update(f"{len(path)}:{path}:{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _sha256(path: Path, advance: Advance | None = None) -> str:
    began, seen = time.time_ns(), path.stat()
    if seen.st_size < REMEMBERED_BYTES:
        return sha256_of(path)
    note = _note(path, seen)
    if known := _known(note):
        return known
    found = sha256_of(path, advance)
    if _is_remembered(seen, began) and note == _note(path, path.stat()):
        with suppress(OSError):  # else the next call hashes the file again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, found)
    return found


def _is_remembered(seen: os.stat_result, now_ns: int) -> bool:
    """Whether the digest of a file is stored: it is large, and was not written to just now."""
    is_large = seen.st_size >= REMEMBERED_BYTES
    return is_large and now_ns - seen.st_ctime_ns > SETTLED_NS


def _known(note: Path) -> str | None:
    """The digest that is stored in a file."""
    with suppress(OSError, ValueError):
        known = note.read_text(encoding="ascii")
        return known if SHA256.fullmatch(known) else None
    return None


def _note(path: Path, seen: os.stat_result) -> Path:
    """The file that stores the digest of a file in this state."""
    state = (path.resolve(), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    digest = hashlib.sha256(repr((*map(str, state), seen.st_ctime_ns)).encode()).hexdigest()
    return Path(constants.HF_HOME) / "lewis-hub" / "digests" / digest[:32]
