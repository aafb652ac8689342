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
from lewis_hub.files import sha256_of, size_of, write_whole
from lewis_hub.hub.source import digest_like

N_HASHING_THREADS = 2
REMEMBERED_BYTES = 1 << 20  # hashing a smaller file is as fast as reading its stored digest
LONG_BYTES = 1 << 30  # hashing fewer takes a few seconds, and needs no progress
PIECE_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # longer than the tick of any file system's clock
SHA256 = re.compile(r"[0-9a-f]{64}")


def digests_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file as `sha256:<hex>`, in the order given."""
    with ThreadPoolExecutor(N_HASHING_THREADS) as pool:
        return [f"sha256:{found}" for found in pool.map(_sha256, paths)]


def remember_digests(paths: Sequence[Path], progress: Progress) -> None:
    """Hash files whose digests are not stored yet, with progress, if they are large."""
    sizes = {path: size_of(path) for path in paths}
    new = [path for path in paths if sizes[path] >= REMEMBERED_BYTES and not _known(path)]
    n_bytes = sum(sizes[path] for path in new)
    if n_bytes < LONG_BYTES:
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
    if known := _known(path):
        return known
    note = _note(path, seen)
    found = _read_whole(path, advance) if advance else sha256_of(path)
    if began - seen.st_ctime_ns > SETTLED_NS and note == _note(path, path.stat()):
        with suppress(OSError):  # else the next call hashes the file again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, found)
    return found


def _known(path: Path) -> str | None:
    """The stored digest of a file in its present state."""
    with suppress(OSError, ValueError):
        known = _note(path, path.stat()).read_text(encoding="ascii")
        return known if SHA256.fullmatch(known) else None
    return None


def _read_whole(path: Path, advance: Advance) -> str:
    """The sha256 of a file; `advance` counts its bytes."""
    total, piece = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(piece):
            total.update(piece[:n_bytes])
            advance(n_bytes)
    return total.hexdigest()


def _note(path: Path, seen: os.stat_result) -> Path:
    """The file that stores the digest of a file in this state."""
    state = (path.resolve(), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    digest = hashlib.sha256(repr((*map(str, state), seen.st_ctime_ns)).encode()).hexdigest()
    return Path(constants.HF_HOME) / "lewis-hub" / "digests" / digest[:32]
