"""Files on disk: digests, atomic writes, and checks for links, space and permission."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection
from itertools import chain
from pathlib import Path, PurePath
from stat import S_ISDIR, S_ISLNK, S_ISREG
from tempfile import TemporaryDirectory

from lewis_hub.display import Advance
from lewis_hub.errors import LocatedError, OutputError
from lewis_hub.system import create_binary

PIECE_BYTES = 1 << 18  # that is hashed at a time
NAME_A_FOLDER = "Name a folder that you may write to with -o."
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}
OF_THE_DISK = {
    *DISK_FULL,
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ESTALE, errno.EINTR),
}


def sha256_of(path: Path, advance: Advance | None = None) -> str:
    """The sha256 of a file, as 64 hex digits; `advance` counts the bytes that are read."""
    total, piece = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb") as file:
        while n_bytes := file.readinto(piece):
            total.update(piece[:n_bytes])
            if advance:
                advance(n_bytes)
    return total.hexdigest()


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none, as of one that another run renames or deletes."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def visible_files(folder: Path, error: type[LocatedError]) -> list[Path]:
    """The files that are neither hidden nor in a hidden folder such as .git or .cache, in order.

    Raises:
        LocatedError: of the type `error`, as for `require_inside`.
    """
    found = []
    for path in sorted(folder.rglob("*"), key=Path.as_posix):
        if is_hidden(path.relative_to(folder)) or (path.is_dir() and not path.is_symlink()):
            continue
        require_inside(folder, path, error)
        if path.is_file():
            _require_utf8(path.relative_to(folder), str(folder), error)
            found.append(path)
    return found


def _require_utf8(name: Path, where: str, error: type[LocatedError]) -> None:
    try:
        str(name).encode()
    except UnicodeEncodeError:
        problem = f"the name of a file in it is not UTF-8: {ascii(str(name))}"
        raise error(where, problem, "Rename or delete the file.") from None


def part_of(folder: Path, path: Path) -> Path | None:
    """Where a path is in a folder, as both are written, else by what they lead to."""
    if (part := _written_part(folder, path)) is not None:
        return part
    root, target = folder.resolve(), path.resolve()
    return target.relative_to(root) if target.is_relative_to(root) else None


def _written_part(folder: Path, path: Path) -> Path | None:
    around, written = map(_absolute, (folder, path))
    return written.relative_to(around) if written.is_relative_to(around) else None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - a Path follows links, or keeps `..`


def require_no_link_out(folder: Path, path: Path, error: type[LocatedError]) -> None:
    """Refuse a path that is written as one in the folder, as `require_inside` does."""
    if _written_part(folder, path) is not None and os.path.lexists(_absolute(path)):
        require_inside(_absolute(folder), _absolute(path), error)


def require_inside(folder: Path, path: Path, error: type[LocatedError]) -> None:
    """Refuse a path in a folder that is not a file of this folder.

    A snapshot in huggingface_hub's cache consists of links to the blobs of its repo, and those
    from Xet are links to blobs of the whole cache.

    Raises:
        LocatedError: of the type `error`: the path leads out of the folder, to a hidden file or to
            nothing, or it is a FIFO, a socket or a device, which could wait or never end.
    """
    root, target = (Path(os.path.realpath(one)) for one in (folder, path))
    cached = [one.parent for one in (root, *root.parents)[:-1] if one.parent.name == "snapshots"]
    blobs = [(one.with_name("blobs"), one.parent.with_name("blobs")) for one in cached]
    roots = [root, *(place for both in blobs for place in both)]
    part = path.relative_to(folder)
    inside = [target.relative_to(one) for one in roots if target.is_relative_to(one)]
    if not inside or not target.exists():
        problem = f"`{part.as_posix()}` is a link to outside of the folder, or to nothing"
    elif is_hidden(inside[0]) and not is_hidden(part):
        problem = f"`{part.as_posix()}` is a link to a hidden file"
    elif not (target.is_file() or target.is_dir()):
        problem = f"`{part.as_posix()}` is a FIFO, a socket or a device"
    else:
        return
    raise error(str(folder), problem, "Put the file itself in its place.")


def is_hidden(part: PurePath) -> bool:
    """Whether a path, relative to a folder, is hidden in it."""
    return any(piece.startswith(".") for piece in part.parts)


def text_of(path: Path, max_bytes: int) -> str:
    """The text of a file that may be of others; what is no UTF-8 in it is replaced.

    Raises:
        OSError: it cannot be read, is larger, or is a FIFO or a device, which may never end.
    """
    if not path.is_file():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content.decode("utf-8", errors="replace")


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never a part.

    A link at `path` is replaced, not followed.
    """
    new = path.with_name(path.name + ".new")
    with os.fdopen(create_binary(new), "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    new.replace(path)


def require_no_links(folder: Path) -> None:
    """Refuse a folder to write to that is a link, or has links in it.

    What is written or deleted there would be elsewhere. A recipe that others wrote may come with
    such a folder.

    Raises:
        OutputError: it names the link, the FIFO, the socket or the device.
    """
    inside = (Path(root, name) for root, *names in os.walk(folder) for name in chain(*names))
    for path in chain([folder], inside):
        require_no_link(path)


def require_no_links_among(folder: Path, folders: Collection[str] = ()) -> None:
    """As `require_no_links`, for a folder that you name, where you may have files of your own.

    Its hidden files and its folders are yours, but for the `folders` that are written; a link to a
    folder is one.
    """
    require_no_link(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in folders:
            require_no_links(path)
        elif not (path.is_dir() or is_hidden(path.relative_to(folder))):
            require_no_link(path)


def require_no_link(path: Path) -> None:
    """As `require_no_links`, for a file, or for a folder where links are replaced, not followed."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it does not exist, or not any more
        return
    if not (S_ISDIR(mode) or S_ISREG(mode)):
        kind = "a link" if S_ISLNK(mode) else "a FIFO, a socket or a device"
        problem = f"it is {kind}, and files are written only in folders that you name"
        raise OutputError(str(path), problem, "Delete it, or name another folder with -o.")


def require_room(folder: Path, n_bytes: int, content: str, remedy: str, where: str = "") -> None:
    """Refuse work whose files the disk cannot hold.

    Args:
        folder: on the disk; it may not exist yet.
        n_bytes: of the files that will be written.
        content: the files, for the message; in the plural.
        remedy: an alternative to freeing space.
        where: for the message; the folder if not given.

    Raises:
        OutputError: fewer bytes are free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if n_bytes > free:
        problem = f"{content} need {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise OutputError(where or str(folder), problem, f"Free some space, or {remedy}.")


def require_writable(folder: Path, remedy: str = NAME_A_FOLDER) -> None:
    """Refuse, before any work, a folder that cannot be written; it may not exist yet.

    Raises:
        OutputError: no file can be created in it, or in its nearest existing parent.
    """
    try:
        with TemporaryDirectory(prefix=".lewis-hub-", dir=existing(folder)):
            pass
    except OSError as error:
        raise unwritable(folder, error, remedy) from None


def unwritable(path: Path, error: OSError, remedy: str = NAME_A_FOLDER) -> OutputError:
    """The error for a path that cannot be written; a full disk has a remedy of its own."""
    if error.errno in DISK_FULL:
        remedy = "Free some space, or name a folder on another disk with -o; then run again."
    return OutputError(str(path), f"it cannot be written ({error.strerror})", remedy)


def raise_if_of_the_disk(error: BaseException) -> None:
    """Raise an error of the disk, such as a full one, that is or made an error of a library."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in OF_THE_DISK:
            raise cause from None


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def path_of(name: str) -> Path:
    """The path that a name is, below a home folder if it starts with `~` and there is one."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (a Path raises an error if there is none)


def starts_like_path(name: str) -> bool:
    """Whether a name of a model or dataset can only be a path, on Windows also with a drive."""
    return name.startswith((".", "/", "~")) or Path(name).is_absolute()
