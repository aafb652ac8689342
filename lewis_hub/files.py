"""Small things done to files on disk, so that each is done in one way."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from lewis_hub.errors import OutputError


def sha256_of(path: Path) -> str:
    """The 64 hex digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, never a part."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def require_room(folder: Path, n_bytes: int, what: str, remedy: str, where: str = "") -> None:
    """Refuse to begin what a disk cannot hold.

    Args:
        folder: on the disk; it need not be there yet.
        n_bytes: that will be written.
        what: needs them, for the message; in the plural.
        remedy: beside freeing space.
        where: in the message; the folder unless it is given.

    Raises:
        OutputError: fewer bytes are free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if n_bytes > free:
        problem = f"{what} need {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free."
        raise OutputError(where or str(folder), problem, f"Free some space, or {remedy}.")


def require_writable(
    folder: Path, remedy: str = "Name a folder that you may write to with -o."
) -> None:
    """Refuse, before any work, a folder that cannot be written; it need not be there yet.

    Raises:
        OutputError: nothing can be made in it, or in the nearest folder above that is there.
    """
    try:
        with TemporaryDirectory(prefix=".lewis-hub-", dir=existing(folder)):
            pass
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})."
        raise OutputError(str(folder), problem, remedy) from None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
