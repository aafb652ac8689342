"""What Linux, macOS and Windows do not have in common: a call where it exists, else a substitute.

All other modules use only calls that Python has on the three; tests/test_system.py checks this.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from io import FileIO, TextIOWrapper
from pathlib import Path
from threading import Lock, RLock
from typing import TextIO

MOVES_OPEN_FILES = os.name != "nt"  # whether open files can be renamed and deleted
NOT_RESERVED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
NOT_LOCKED = {errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
MAX_OPEN_FILES = 10_240  # as many as macOS allows
RENAME_WAITS_S = (0.1, 0.2, 0.5, 1.0, 2.0)

_turn = Lock()  # of threads that move the position of a file
_limited = RLock()  # held while memory is limited


def n_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The memory of this machine; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_bytes() -> int | None:
    """The peak of this process's resident memory since its start; None if unknown."""
    try:
        import resource
    except ImportError:
        return None
    return _resident_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def allow_open_files() -> None:
    """Let this process open up to MAX_OPEN_FILES files, as far as the system lets it.

    A merge keeps all shards of its models open, and many systems start programs with 256 or 1,024.
    """
    try:
        import resource
    except ImportError:
        return
    now, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_limited = highest != resource.RLIM_INFINITY
    asked = min(MAX_OPEN_FILES, highest) if is_limited else MAX_OPEN_FILES
    if now != resource.RLIM_INFINITY and now < asked:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked, highest))


def resident_bytes() -> int | None:
    """The resident memory of this process, or its peak; None if the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def limited_memory(n_bytes: int) -> Iterator[None]:
    """Let this process have at most so much more memory inside the block.

    What asks for more fails, in other threads too; most libraries raise a MemoryError. Only Linux
    has such a limit.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    except (ImportError, OSError):
        yield
        return
    with _limited:  # by one block at a time: the last one to end would else keep its limit
        before, highest = resource.getrlimit(resource.RLIMIT_DATA)
        limit = pages * resource.getpagesize() + n_bytes
        limits = [one for one in (limit, before, highest) if one != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), highest))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (before, highest))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python or of PyTorch, says that there is not enough memory."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (
        isinstance(error, MemoryError) or "DefaultCPUAllocator" in said or "out of memory" in said
    )


def peak_if_ended(process: subprocess.Popen[bytes]) -> int | None:
    """The peak of the resident memory of a process that ended, 0 if unknown; None if it runs."""
    if not hasattr(os, "wait4"):
        return None if process.poll() is None else 0
    ended_id, status, usage = os.wait4(process.pid, os.WNOHANG)
    if ended_id != process.pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return _resident_bytes(usage.ru_maxrss)


def _resident_bytes(counted: int) -> int:
    return counted if sys.platform == "darwin" else counted * 1024  # Linux counts KiB


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kill a process that has its own session, and all processes in it; on Windows only itself."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def make_nonblocking(descriptor: int) -> None:
    """Let writes to a full pipe fail instead of wait; Python on Windows cannot before 3.12."""
    if hasattr(os, "set_blocking"):
        os.set_blocking(descriptor, False)


def open_closed_streams() -> None:
    """Open the null device in place of the standard streams that were closed before the start.

    The next file that is opened would else be what libraries print to.
    """
    for at, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(at)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(at, "w" if at else "r", encoding="utf-8", closefd=False)  # noqa: SIM115 (for the whole run)
            setattr(sys, name, stream)


def write_utf8(*streams: TextIO) -> None:
    """Write UTF-8 to pipes and files on Windows too, where Python uses an older encoding."""
    for stream in streams:
        if os.name == "nt" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8")


def open_binary(path: Path, flags: int) -> int:
    """Open a file without translation of line ends; returns its descriptor."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


def create_binary(path: Path, flags: int = os.O_WRONLY | os.O_TRUNC) -> int:
    """Open a file to write, which is created if it is missing; an OSError if it is a link."""
    return open_binary(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))


def read_at(descriptor: int, into: memoryview, position: int) -> int:
    """Read bytes from a position on; returns their number, 0 at the end. Threads may share a file.

    Where the system needs two calls for it, threads take turns.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], position)
    with _turn, FileIO(descriptor, "r", closefd=False) as file:
        file.seek(position)
        return file.readinto(into) or 0


def write_at(descriptor: int, content: memoryview, position: int) -> None:
    """Write all bytes at a position. Threads may share a file.

    A call may write a part: what is left of a disk that becomes full, or of a limit.
    """
    while content.nbytes:
        n_written = _write_part(descriptor, content, position)
        content, position = content[n_written:], position + n_written


def _write_part(descriptor: int, content: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, position)
    with _turn:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, content)


def reserve(descriptor: int, n_bytes: int) -> None:
    """Give a file its size; also its space on the disk, if system and disk can reserve it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            if error.errno not in NOT_RESERVED:
                raise
        else:
            return
    os.ftruncate(descriptor, n_bytes)


def leave_cache(descriptor: int, start: int, stop: int) -> None:
    """Drop a range from the page cache where it is on the disk; start writing the rest."""
    if stop > start and hasattr(os, "posix_fadvise"):  # a length of 0 would mean the whole file
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; Windows cannot open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file until it is closed, where the disk has locks; False if it is locked already."""
    try:
        import fcntl
    except ImportError:
        windows = import_module("msvcrt")
        try:
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_LOCKED:
            raise
    return True


def rename_folder(folder: Path, new: Path) -> None:
    """Rename a folder. Windows refuses while a file in it is open, as those of a mapped model."""
    for wait_s in () if MOVES_OPEN_FILES else RENAME_WAITS_S:
        gc.collect()
        try:
            folder.rename(new)
        except PermissionError:
            time.sleep(wait_s)
        else:
            return
    folder.rename(new)
