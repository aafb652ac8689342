"""Digests of files; those of large files are stored, so that each is read once."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from lewis_hub.files import sha256_of, write_whole
from lewis_hub.hub.source import digest_like

N_HASHING_THREADS = 2
REMEMBERED_BYTES = 1 << 20  # hashing a smaller file is as fast as reading its stored digest
SETTLED_NS = 2_000_000_000  # longer than the tick of any file system's clock
SHA256 = re.compile(r"[0-9a-f]{64}")


def digests_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file as `sha256:<hex>`, in the order given."""
    with ThreadPoolExecutor(N_HASHING_THREADS) as pool:
        return [f"sha256:{found}" for found in pool.map(_sha256, paths)]


def git_sha1_of(path: Path) -> str:
    """The id that git gives a file, as `git-sha1:<hex>`; for small files."""
    return digest_like("git-sha1:", path.read_bytes())


def content_sha(digests: Iterable[tuple[str, str]]) -> str:
    """One digest of (path, digest) pairs; it depends neither on their order nor on the folder."""
    total = hashlib.sha256()
    for path, digest in sorted(digests):
        total.update(f"{len(path)}:{path}:{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _sha256(path: Path) -> str:
    began, seen = time.time_ns(), path.stat()
    if seen.st_size < REMEMBERED_BYTES:
        return sha256_of(path)
    note = _note(path, seen)
    with suppress(OSError, ValueError):
        if SHA256.fullmatch(known := note.read_text(encoding="ascii")):
            return known
    found = sha256_of(path)
    if began - seen.st_ctime_ns > SETTLED_NS and note == _note(path, path.stat()):
        with suppress(OSError):  # else the next call hashes the file again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, found)
    return found


def _note(path: Path, seen: os.stat_result) -> Path:
    """The file that stores the digest of a file in this state."""
    state = (path.resolve(), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    digest = hashlib.sha256(repr((*map(str, state), seen.st_ctime_ns)).encode()).hexdigest()
    return Path(constants.HF_HOME) / "lewis-hub" / "digests" / digest[:32]
