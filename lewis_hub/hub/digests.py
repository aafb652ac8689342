"""Digests of local files: several at a time, and of a large file that is as it was only once.

What was hashed is remembered as git's index does: by path, inode, size and times to the nanosecond.
A change of content changes one of them, but for a file that was written to a moment before.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants

from lewis_hub.files import sha256_of, write_whole

N_HASHING_THREADS = 2
REMEMBERED_BYTES = 1 << 20  # a smaller file is hashed as quickly as looked up
SETTLED_NS = 2_000_000_000  # longer than the tick of any file system's clock
SHA256 = re.compile(r"[0-9a-f]{64}")


def digests_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file as `sha256:<hex>`, in the order given."""
    with ThreadPoolExecutor(N_HASHING_THREADS) as pool:
        return [f"sha256:{found}" for found in pool.map(_sha256, paths)]


def git_sha1_of(path: Path) -> str:
    """The id that git gives a file, as `git-sha1:<hex>`; for small files."""
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return f"git-sha1:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


def content_sha(digests: Iterable[tuple[str, str]]) -> str:
    """One digest over (path, digest) pairs, whatever their order and place on disk."""
    total = hashlib.sha256()
    for path, digest in sorted(digests):
        total.update(f"{len(path)}:{path}:{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _sha256(path: Path) -> str:
    began, seen = time.time_ns(), path.stat()
    if seen.st_size < REMEMBERED_BYTES:
        return sha256_of(path)
    note = _note(path, seen)
    try:
        known = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        known = ""
    if SHA256.fullmatch(known):
        return known
    found = sha256_of(path)
    if began - seen.st_ctime_ns > SETTLED_NS and note == _note(path, path.stat()):
        _remember(note, found)
    return found


def _note(path: Path, seen: os.stat_result) -> Path:
    """Where the digest of a file in this state is remembered."""
    state = (path.resolve(), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    told = hashlib.sha256(repr((*map(str, state), seen.st_ctime_ns)).encode()).hexdigest()
    return Path(constants.HF_HOME) / "lewis-hub" / "digests" / told[:32]


def _remember(note: Path, digest: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, digest)
    except OSError:
        return  # it is hashed again next time
