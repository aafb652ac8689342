"""Files that stay where they are: ranges of them come ahead of their use and go after it.

Each request's bytes wait in a scratch file until the tensors that need them are made, so that they
may be read in any order and as often as a method wants, and cost no memory.
"""

from __future__ import annotations

import os
import shutil
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Reader, TensorReader, whole_tensor

if TYPE_CHECKING:
    from torch import Tensor


N_REQUESTS = 8  # in flight
REQUEST_BYTES = 8 << 20  # at most

Take = Callable[[int, bytes], object]  # (where a piece begins in its file, the piece)
Fetch = Callable[[str, int, int, Take], None]  # (file, start, stop, take) brings [start, stop)
Place = Path | Fetch  # a folder here, or how to get at files elsewhere


@dataclass(frozen=True)
class Need:
    """Bytes [start, stop) of a source's file."""

    source: str  # its label
    file: str
    start: int
    stop: int


@dataclass(eq=False)
class _Request:
    """Neighbours in one file, and the steps of the work that need them, from first to last."""

    source: str
    file: str
    start: int
    stop: int
    first: int
    last: int
    path: Path
    arrival: Future[None] | None = None  # None: it was not sent yet

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


class Window:
    """The files of several sources. Threads may share it; close it.

    What a step of the work needs is fetched before it comes, in the order of the steps and with
    several requests at a time, and dropped after `step_done`. Whoever waits for a later step gets
    it, so that no thread waits for another's work. `most_held` tells how much lies in `scratch` at
    most.

    Args:
        places: label of a source -> where its files are.
        steps: what each step needs of the sources that are elsewhere.
        scratch: a folder that this makes and deletes.
        most_bytes: that lie ready; a step that needs more by itself gets that and nothing ahead.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        steps: Sequence[Sequence[Need]],
        scratch: Path,
        most_bytes: int,
    ) -> None:
        self._places, self._scratch, self._most_bytes = places, scratch, most_bytes
        self._requests = _requests(steps, most_bytes, scratch)
        self._of_file: defaultdict[tuple[str, str], list[_Request]] = defaultdict(list)
        self._last_needed: defaultdict[int, list[_Request]] = defaultdict(list)
        for one in self._requests:
            self._of_file[one.source, one.file].append(one)
            self._last_needed[one.last].append(one)
        for found in self._of_file.values():
            found.sort(key=lambda one: one.start)
        self._n_sent = self._step = self._held_bytes = 0
        self._awaited = 0  # the last step that somebody waited for
        self._n_leaving = 0  # requests that nobody needs any more, and that are still here
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(N_REQUESTS, "lewis-hub-ranges")
        self._is_closed = False

    def __enter__(self) -> Window:
        shutil.rmtree(self._scratch, ignore_errors=True)  # what a killed run left
        if self._requests:
            self._scratch.mkdir(parents=True)
        with self._changed:
            self._send()
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody is waited for: a request under way ends at its next piece."""
        with self._changed:
            self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def reader(self, label: str) -> Reader:
        """The tensors of a source, wherever it is."""
        place = self._places[label]
        return TensorReader(place, label) if isinstance(place, Path) else RangeReader(self, label)

    def step_done(self) -> None:
        """Drop what no later step needs; steps are done in their order."""
        with self._changed:
            gone = self._last_needed.pop(self._step, [])
            self._step += 1
            self._n_leaving += len(gone)
        for one in gone:
            assert one.arrival  # the current step's are always sent
            one.arrival.add_done_callback(partial(self._drop, one))
        with self._changed:
            self._send()

    def _drop(self, one: _Request, _: Future[None]) -> None:
        """Make room, and only then ask for more."""
        one.path.unlink(missing_ok=True)
        with self._changed:
            self._held_bytes -= one.n_bytes
            self._n_leaving -= 1
            self._send()

    def read(self, source: str, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file from `start` on, waiting until they are here.

        Raises:
            LewisHubError: they could not be fetched.
        """
        into = into.cast("B")
        while into.nbytes:
            one = self._arrived(source, file, start)
            try:
                descriptor = os.open(one.path, os.O_RDONLY)
            except FileNotFoundError:
                if one.last >= self._step:
                    raise
                continue  # dropped meanwhile: a later step has it again
            try:
                n_read = os.preadv(descriptor, [into[: one.stop - start]], start - one.start)
            finally:
                os.close(descriptor)
            into, start = into[n_read:], start + n_read

    def _arrived(self, source: str, file: str, position: int) -> _Request:
        """The first request for a position that is not dropped, once it is here."""
        found = self._of_file[source, file]
        low = bisect_right(found, position - REQUEST_BYTES, key=lambda one: one.start)
        high = bisect_right(found, position, key=lambda one: one.start)
        with self._changed:
            assert not self._is_closed, "the window is read after it was closed"
            one = min(
                (o for o in found[low:high] if position < o.stop and o.last >= self._step),
                key=lambda one: one.first,
            )
            if one.arrival is None:
                self._awaited = max(self._awaited, one.first)
                self._send()
            while one.arrival is None:
                self._changed.wait()
        one.arrival.result()
        return one

    def _send(self) -> None:
        """Ask for as much more as there is room for, and tell who waits for it."""
        while self._n_sent < len(self._requests) and not self._is_closed:
            one = self._requests[self._n_sent]
            fits = self._held_bytes + one.n_bytes <= self._most_bytes
            if not fits and (one.first > max(self._step, self._awaited) or self._n_leaving):
                return
            one.arrival = self._pool.submit(self._fetch, one)
            self._n_sent += 1
            self._held_bytes += one.n_bytes
            self._changed.notify_all()

    def _fetch(self, one: _Request) -> None:
        fetch = self._places[one.source]
        assert not isinstance(fetch, Path)  # only what is elsewhere is needed
        with one.path.open("wb", buffering=0) as file:

            def take(position: int, piece: bytes) -> None:
                if self._is_closed:
                    raise CancelledError
                os.pwrite(file.fileno(), piece, position - one.start)

            fetch(one.file, one.start, one.stop, take)


class RangeReader:
    """The tensors of a source that is elsewhere. Threads may share it.

    Args:
        window: holds what is read next; whoever opened it closes it.
        label: of the source.
    """

    def __init__(self, window: Window, label: str) -> None:
        self._window, self._label = window, label

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: the window belongs to whoever opened it."""

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on, once they are here.

        Raises:
            LewisHubError: they could not be fetched.
        """
        self._window.read(self._label, tensor.shard, tensor.start + first_byte, into)

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:  # noqa: ARG002
        """None: what came may lie in several files."""
        return None

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)


def elsewhere(places: Mapping[str, Place]) -> list[str]:
    """The labels of the sources whose files are not here."""
    return [label for label, place in places.items() if not isinstance(place, Path)]


def most_held(steps: Sequence[Sequence[Need]], most_bytes: int, n_together: int = 1) -> int:
    """The most bytes that lie in a window's scratch folder at a time.

    Args:
        steps: the window's.
        most_bytes: the window's.
        n_together: how many neighbouring steps are worked on at a time.
    """
    changes = [0] * (len(steps) + 1)
    requests = _requests(steps, most_bytes, Path())
    for one in requests:
        changes[max(one.first - n_together + 1, 0)] += one.n_bytes
        changes[one.last + 1] -= one.n_bytes
    largest_steps = max(accumulate(changes), default=0)
    return min(sum(one.n_bytes for one in requests), max(most_bytes, largest_steps))


def _requests(steps: Sequence[Sequence[Need]], most_bytes: int, scratch: Path) -> list[_Request]:
    """One request for neighbours, several for what is large; in the order of their first use."""
    longest = min(REQUEST_BYTES, max(1, most_bytes // N_REQUESTS))
    made: list[_Request] = []
    newest: dict[tuple[str, str], _Request] = {}  # of each file
    for step, needs in enumerate(steps):
        for need in dict.fromkeys(needs):
            start, before = need.start, newest.get((need.source, need.file))
            neighbours = before and before.stop == start and before.last >= step - 1
            if before and neighbours and before.n_bytes < longest:
                before.stop = min(need.stop, before.start + longest)
                before.last, start = step, before.stop
            while start < need.stop:
                stop = min(start + longest, need.stop)
                path = scratch / str(len(made))
                made.append(_Request(need.source, need.file, start, stop, step, step, path))
                newest[need.source, need.file] = made[-1]
                start = stop
    return made
