"""Digests of local files: several at a time, as hashing is as slow as the disk is fast."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lewis_hub.files import sha256_of

N_HASHING_THREADS = 2


def digests_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file as `sha256:<hex>`, in the order given."""
    with ThreadPoolExecutor(N_HASHING_THREADS) as pool:
        return [f"sha256:{found}" for found in pool.map(sha256_of, paths)]


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
