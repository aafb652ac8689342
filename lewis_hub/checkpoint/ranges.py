"""The weight files of several sources, each in a local folder or behind byte ranges.

`SourceFiles` knows which tensors each step reads, and opens local and remote files in one way.
Remote ranges are fetched ahead of their step into a scratch folder and deleted after it, so that a
step may read its tensors in any order and as often as it needs, and the ranges cost no memory.
"""

from __future__ import annotations

import os
import shutil
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import TensorReader
from lewis_hub.errors import OutputError
from lewis_hub.system import open_binary, read_at, write_at

N_REQUESTS = 8  # in flight
REQUEST_BYTES = 8 << 20  # at most

TakePiece = Callable[[int, bytes], object]  # (offset of a piece in its file, the piece)
FetchRange = Callable[[str, int, int, TakePiece], None]  # (file, start, stop, take)
Location = Path | FetchRange  # of weight files: a local folder, or a function that fetches
Locations = Mapping[str, Location]  # by the label of the source


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that a step reads."""

    source: str  # the label of its checkpoint
    header: TensorHeader  # of the tensor in this checkpoint
    base: str | None = None  # the label of the checkpoint that stores an adapter's base

    def stored(self) -> Iterator[tuple[str, TensorHeader]]:
        """The source and header of each stored tensor that it is computed from."""
        adapted, source = self.header.adapted, self.base or self.source
        if adapted:
            yield from SourceTensor(source, adapted.base).stored()
            for part in adapted.own:
                yield from SourceTensor(self.source, part).stored()
        else:
            yield from ((source, part) for part in _stored_parts(self.header.scaled or self.header))


@dataclass(eq=False)
class _Request:
    """Adjacent bytes of one file, and the first and the last step that read them."""

    source: str
    file: str
    start: int
    stop: int
    first: int
    last: int
    path: Path
    arrival: Future[None] | None = None  # None until the request is sent

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


class SourceFiles:
    """Opened weight files of several sources. Threads may share it; close it.

    The remote bytes of a step are fetched ahead, in the order of the steps and with several
    requests in flight, and deleted after `step_done`. A thread that reads for a later step gets its
    bytes at once, so no thread waits for another thread's work. A step that needs more than
    `max_bytes` gets its own bytes only. `scratch_bytes` says how much the folder `scratch`, which
    is created and deleted here, holds at most.

    `locations` are those of the sources and of the bases of adapters; `steps` are the tensors that
    each step reads, of which a local source's may be left out.
    """

    def __init__(
        self,
        locations: Locations,
        steps: Sequence[Sequence[SourceTensor]],
        scratch: Path,
        max_bytes: int,
    ) -> None:
        self._locations, self._scratch, self._max_bytes = locations, scratch, max_bytes
        self._requests = _requests(locations, steps, max_bytes, scratch)
        self._of_file: defaultdict[tuple[str, str], list[_Request]] = defaultdict(list)
        self._last_read: defaultdict[int, list[_Request]] = defaultdict(list)
        for request in self._requests:
            self._of_file[request.source, request.file].append(request)
            self._last_read[request.last].append(request)
        for requests in self._of_file.values():
            requests.sort(key=lambda request: request.start)
        self._n_sent = self._step = self._fetched_bytes = 0
        self._awaited = 0  # the last step that a thread waited for
        self._n_leaving = 0  # requests that no step needs any more and that are not deleted yet
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(N_REQUESTS, "lewis-hub-ranges")
        self._is_closed = False

    def __enter__(self) -> SourceFiles:
        shutil.rmtree(self._scratch, ignore_errors=True)  # left by a run that was killed
        if self._requests:
            self._scratch.mkdir(parents=True)
        with self._changed:
            self._send()
        return self

    def __exit__(self, *_: object) -> None:
        """Close without waiting: a request in flight ends at its next piece."""
        with self._changed:
            self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def reader(self, label: str) -> TensorReader | RangeReader:
        """Open the tensors of one source as its files store them."""
        location = self._locations[label]
        if isinstance(location, Path):
            return TensorReader(location, label)
        return RangeReader(self, label)

    def step_done(self) -> None:
        """End the current step: delete the bytes that no later step reads."""
        with self._changed:
            unneeded = self._last_read.pop(self._step, [])
            self._step += 1
            self._n_leaving += len(unneeded)
        for request in unneeded:
            assert request.arrival  # the current step's requests are always sent
            request.arrival.add_done_callback(partial(self._delete, request))
        with self._changed:
            self._send()

    def _delete(self, request: _Request, _: Future[None]) -> None:
        """Delete the bytes of a request, then send the requests that fit instead."""
        with suppress(PermissionError):  # Windows: a thread still reads it; `__exit__` deletes it
            request.path.unlink(missing_ok=True)
        with self._changed:
            self._fetched_bytes -= request.n_bytes
            self._n_leaving -= 1
            self._send()

    def read(self, source: str, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with bytes of a remote file from `start` on, or raise the fetch's error."""
        into = into.cast("B")
        while into.nbytes:
            request = self._fetched(source, file, start)
            try:
                descriptor = open_binary(request.path, os.O_RDONLY)
            except FileNotFoundError:
                if request.last >= self._step:
                    raise
                continue  # deleted meanwhile: a later step has the bytes again
            try:
                wanted = into[: request.stop - start]
                n_read = read_at(descriptor, wanted, start - request.start)
            finally:
                os.close(descriptor)
            if not n_read:
                problem = "another process truncated it while it was read"
                raise OutputError(str(request.path), problem, "Run the same command again.")
            into, start = into[n_read:], start + n_read

    def _fetched(self, source: str, file: str, position: int) -> _Request:
        """Wait for the first request that holds a position and is not deleted."""
        requests = self._of_file[source, file]
        low = bisect_right(requests, position - REQUEST_BYTES, key=lambda request: request.start)
        high = bisect_right(requests, position, key=lambda request: request.start)
        with self._changed:
            assert not self._is_closed, "a reader was used after its SourceFiles were closed"
            request = min(
                (r for r in requests[low:high] if position < r.stop and r.last >= self._step),
                key=lambda request: request.first,
            )
            if request.arrival is None:
                self._awaited = max(self._awaited, request.first)
                self._send()
            while request.arrival is None:
                self._changed.wait()
        request.arrival.result()
        return request

    def _send(self) -> None:
        """Send the requests that fit into `max_bytes`, and those that a thread waits for."""
        while self._n_sent < len(self._requests) and not self._is_closed:
            request = self._requests[self._n_sent]
            fits = self._fetched_bytes + request.n_bytes <= self._max_bytes
            is_ahead = request.first > max(self._step, self._awaited)
            if not fits and (is_ahead or self._n_leaving):
                return
            request.arrival = self._pool.submit(self._fetch, request)
            self._n_sent += 1
            self._fetched_bytes += request.n_bytes
            self._changed.notify_all()

    def _fetch(self, request: _Request) -> None:
        fetch = self._locations[request.source]
        assert not isinstance(fetch, Path)  # only remote ranges are requested
        with self._changed:  # a file that begins after `__exit__` would be left behind
            if self._is_closed:
                raise CancelledError
            opened = request.path.open("wb", buffering=0)
        with opened as file:

            def take(position: int, piece: bytes) -> None:
                if self._is_closed:
                    raise CancelledError
                write_at(file.fileno(), memoryview(piece), position - request.start)

            fetch(request.file, request.start, request.stop, take)


@dataclass(frozen=True)
class RangeReader:
    """The tensors of a remote source, whose bytes `files` fetches. Threads may share it."""

    files: SourceFiles
    label: str

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing: the `SourceFiles` are closed by their owner."""

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on, as `SourceFiles.read` does."""
        self.files.read(self.label, tensor.shard, tensor.start + first_byte, into)


def scratch_bytes(
    locations: Locations,
    steps: Sequence[Sequence[SourceTensor]],
    max_bytes: int,
    n_parallel: int = 1,
) -> int:
    """The most bytes that the scratch folder of `SourceFiles` holds at a time.

    The first arguments are those of `SourceFiles`; `n_parallel` consecutive steps run at a time.
    """
    changes = [0] * (len(steps) + 1)
    requests = _requests(locations, steps, max_bytes, Path())
    for request in requests:
        changes[max(request.first - n_parallel + 1, 0)] += request.n_bytes
        changes[request.last + 1] -= request.n_bytes
    largest_steps = max(accumulate(changes), default=0)
    return min(sum(request.n_bytes for request in requests), max(max_bytes, largest_steps))


def absolute_locations(locations: Locations) -> Locations:
    """The same locations for a process that runs in another folder."""
    return {
        label: location.absolute() if isinstance(location, Path) else location
        for label, location in locations.items()
    }


def _stored_parts(part: object) -> Iterator[TensorHeader]:
    """The stored tensors that a quantised tensor is computed from."""
    if isinstance(part, TensorHeader):
        yield part
    elif is_dataclass(part):
        for field in fields(part):
            yield from _stored_parts(getattr(part, field.name))


def _requests(
    locations: Locations, steps: Sequence[Sequence[SourceTensor]], max_bytes: int, scratch: Path
) -> list[_Request]:
    """Join adjacent remote bytes into one request and split many; in the order of their steps."""
    longest = min(REQUEST_BYTES, max(1, max_bytes // N_REQUESTS))
    requests: list[_Request] = []
    newest: dict[tuple[str, str], _Request] = {}  # of each file
    for step, tensors in enumerate(steps):
        stored = dict.fromkeys(part for tensor in tensors for part in tensor.stored())
        for source, part in stored:
            if isinstance(locations[source], Path):
                continue
            start, end = part.start, part.start + part.n_bytes
            before = newest.get((source, part.shard))
            adjacent = before and before.stop == start and before.last >= step - 1
            if before and adjacent and before.n_bytes < longest:
                before.stop = min(end, before.start + longest)
                before.last, start = step, before.stop
            while start < end:
                stop, path = min(start + longest, end), scratch / str(len(requests))
                request = _Request(source, part.shard, start, stop, step, step, path)
                requests.append(request)
                newest[source, part.shard] = request
                start = stop
    return requests
