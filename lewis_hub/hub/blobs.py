"""The embedded Hub's file contents, each stored once under the SHA-256 of its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

POINTER_VERSION = "https://git-lfs.github.com/spec/v1"


def git_oid(content: bytes) -> str:
    """The SHA-1 by which git knows these bytes as a file."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """The small text that git stores in place of a large file."""
    return f"version {POINTER_VERSION}\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)  # noqa: PTH105 - the name is a string until it is the path
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Any) -> None:
    """Replace a JSON file atomically."""
    with replacing(path) as file:
        file.write((json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


class Blobs:
    """A folder of contents addressed by their SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where the content with this digest lies, or would lie."""
        return self.folder / sha256[:2] / sha256

    def size_bytes(self, sha256: str) -> int | None:
        """Size of a stored content; None if it isn't stored."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, sha256: str) -> bytes:
        """All bytes of a stored content."""
        return self.path(sha256).read_bytes()

    def add(self, content: bytes) -> str:
        """Store bytes; returns their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.size_bytes(sha256) is None:
            with replacing(self.path(sha256)) as file:
                file.write(content)
        return sha256
