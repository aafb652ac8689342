"""An output shard: preallocated, written in place by several threads, hashed as it fills."""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import threading
from pathlib import Path

from lewis_hub.checkpoint.layout import ShardLayout
from lewis_hub.errors import OutputError

HASHED_BYTES = 1 << 20  # read back at a time
UNDER_WAY = 64 << 20  # bytes that the disk is given time to take
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PREALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class ShardWriter:
    """A shard that is being written. Threads may share it; they write disjoint ranges.

    The bytes are hashed in the order of the file, by whichever thread completes the next range,
    while they are still in the page cache.

    Args:
        folder: to write into.
        layout: fixes the header and where each tensor goes.
        stays_cached: whether the system keeps the bytes in memory that are on the disk.

    Raises:
        OutputError: there is no room for the whole shard, or it cannot be written.
    """

    def __init__(self, folder: Path, layout: ShardLayout, *, stays_cached: bool) -> None:
        self.path = folder / layout.name
        self.n_bytes = layout.n_bytes
        self._stays_cached = stays_cached
        self._digest = hashlib.sha256()
        self._n_hashed = 0
        self._complete: list[tuple[int, int]] = []  # heap of ranges written and not hashed
        self._completing, self._hashing = threading.Lock(), threading.Lock()
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise _refused(self.path, error) from None
        try:
            _preallocate(self._descriptor, self.n_bytes)
            header = layout.header
            self.write(0, memoryview(header))
            self.complete(0, len(header))
        except OSError as error:
            os.close(self._descriptor)
            raise _refused(self.path, error) from None
        except OutputError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, position: int, content: memoryview) -> None:
        """Write bytes at an offset from the beginning of the file.

        Raises:
            OutputError: the disk is full or failing.
        """
        try:
            while content.nbytes:
                n_written = os.pwrite(self._descriptor, content, position)
                content, position = content[n_written:], position + n_written
        except OSError as error:
            raise _refused(self.path, error) from None

    def complete(self, start: int, stop: int) -> None:
        """Say that the bytes [start, stop) are final; hashes what follows without a gap."""
        if start == stop:
            return
        with self._completing:
            heapq.heappush(self._complete, (start, stop))
        while self._hashing.acquire(blocking=False):
            try:
                followed = self._hash_next()
            finally:
                self._hashing.release()
            if not followed:
                return

    def finish(self) -> str:
        """Bring the shard to the disk; its sha256 as 64 hex digits.

        Raises:
            OutputError: the disk is full or failing.
        """
        while self._hash_next():
            pass
        assert self._n_hashed == self.n_bytes, "a range of the shard was never completed"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _refused(self.path, error) from None
        if not self._stays_cached:
            self._advise(0, self.n_bytes)
        return self._digest.hexdigest()

    def _hash_next(self) -> bool:
        with self._completing:
            if not self._complete or self._complete[0][0] != self._n_hashed:
                return False
            start, stop = heapq.heappop(self._complete)
        held = bytearray(min(HASHED_BYTES, stop - self._n_hashed))
        while self._n_hashed < stop:
            window = memoryview(held)[: stop - self._n_hashed]
            n_read = os.preadv(self._descriptor, [window], self._n_hashed)
            if not n_read:
                problem = "somebody cut it short while it was written."
                raise OutputError(str(self.path), problem, "Run again: finished shards are kept.")
            self._digest.update(window[:n_read])
            self._n_hashed += n_read
        self._let_go(start, stop)
        return True

    def _let_go(self, start: int, stop: int) -> None:
        """Have the disk write a range now, so that nobody waits for it in the end."""
        self._advise(start, stop)
        if not self._stays_cached:
            self._advise(0, stop - UNDER_WAY)

    def _advise(self, start: int, stop: int) -> None:
        """Drop from the cache what is on the disk; of the rest, the disk begins to write it."""
        if stop > start:  # no bytes would mean all
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def _preallocate(descriptor: int, n_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in NO_PREALLOCATION:
            raise
        os.ftruncate(descriptor, n_bytes)


def _refused(path: Path, error: OSError) -> OutputError:
    remedy = "Name a folder that you may write to with -o."
    if error.errno in NO_ROOM:
        remedy = "Free some space, or name a folder on another disk with -o; then run again."
    return OutputError(str(path), f"it cannot be written ({error.strerror}).", remedy)
