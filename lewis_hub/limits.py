"""Time and memory that Python code may take on data of others: neither has a limit of its own."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from lewis_hub.system import resident_bytes

CHECK_EVERY_S = 0.02
STOP_AGAIN_S = 2  # longer than what ends in `finally` and `with` takes
STDERR = 2  # sys.stderr may be none of the system's files
WATCH = "limit of time and memory"
END_WITHIN_S = 0.5  # after a limit

_last: list[float] = []  # when the process ends at last, of each block that it is in
_ends: dict[int, tuple[float, str]] = {}  # thread -> when it ends the process, and what is told
_is_watching = threading.Event()


class TooMuchError(Exception):
    """Code took too much time or memory; its text says how much."""


class _StopError(BaseException):
    """Raised in a thread that takes too much; no `except Exception` catches it."""


@contextmanager
def limited(
    max_s: float, per: str, *, max_bytes: int | None = None, last_s: float | None = None
) -> Iterator[None]:
    """Stop Python code of this thread that takes more than `max_s`, or grows by `max_bytes`.

    C code that keeps the interpreter for itself cannot be stopped, not by Ctrl-C either: after
    `last_s`, if it is given, the process ends, with exit code 1, and stderr says where it was.

    Args:
        max_s: seconds.
        per: what they are the limits of, for the message.
        max_bytes: of the resident memory of this process.
        last_s: seconds.

    Raises:
        TooMuchError: it took too much.
    """
    watch = _Watch(threading.get_ident(), max_s, per, max_bytes)
    with nullcontext() if last_s is None else ended_at_last(last_s):
        try:
            threading.Thread(target=watch.run, name=WATCH, daemon=True).start()
            try:
                with _ignored_stops_untold():
                    yield
            finally:
                watch.end()
                if watch.problem:  # the code may have caught the first one
                    raise _StopError
        except _StopError:
            watch.end()
            if not watch.problem:  # of a limit around this one
                raise
            raise TooMuchError(watch.problem) from None


@contextmanager
def ended_at_last(last_s: float) -> Iterator[None]:
    """End the process, with exit code 1, if the block takes more than `last_s`.

    It does so whatever the code is, but stderr says only where it was.
    """
    until = time.monotonic() + last_s
    _last.append(until)
    _end_at_first()
    try:
        yield
    finally:
        _last.remove(until)
        _end_at_first()


def _end_at_first() -> None:
    """A process has one such end: the first of those of all blocks that it is in."""
    if _last:
        left_s = max(1, math.ceil(min(_last) - time.monotonic()))
        faulthandler.dump_traceback_later(left_s, exit=True, file=STDERR)
    else:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def ended_after(max_s: float, message: str) -> Iterator[None]:
    """End the process, with exit code 1 and a message, if the block takes more than `max_s`.

    For code in Rust, which no error can stop, but which lets other threads run meanwhile. It costs
    some microseconds, and `ended_at_last` and `limited`, which start a thread, some hundred.
    """
    thread_id = threading.get_ident()
    around = _ends.get(thread_id)  # a tokenizer may call itself
    _ends[thread_id] = time.monotonic() + max_s, message
    if not _is_watching.is_set():
        _is_watching.set()
        threading.Thread(target=_end_in_time, name="limit of time", daemon=True).start()
    try:
        yield
    finally:
        if around is None:
            del _ends[thread_id]
        else:
            _ends[thread_id] = around


def _end_in_time() -> None:
    never = threading.Event()
    while not never.wait(END_WITHIN_S):
        for until, message in [*_ends.values()]:
            if time.monotonic() > until:
                with suppress(Exception):  # there may be no stderr
                    sys.stderr.write(f"\n{message}\n")
                    sys.stderr.flush()
                os._exit(1)


@contextmanager
def _ignored_stops_untold() -> Iterator[None]:
    """Let Python print no stop that it ignores, but all other errors."""
    told = sys.unraisablehook

    def tell(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, _StopError):
            told(ignored)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = told


@dataclass
class _Watch:
    """Watches a thread, and raises an error in it if it takes too much.

    Where that error is raised in `__del__` or a callback of the garbage collector, Python ignores
    it: it is raised again until the code ends.
    """

    thread_id: int
    max_s: float
    per: str
    max_bytes: int | None
    problem: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        began, before = time.monotonic(), resident_bytes() or 0
        while not self._ended.wait(STOP_AGAIN_S if self.problem else CHECK_EVERY_S):
            problem = self.problem or self._excess(began, before)
            with self._turn:
                if problem and not self._ended.is_set():
                    self.problem = problem
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self.thread_id), ctypes.py_object(_StopError)
                    )

    def _excess(self, began: float, before: int) -> str:
        if time.monotonic() - began > self.max_s:
            return f"it takes more than {self.max_s:g} s for {self.per}"
        if self.max_bytes and (resident_bytes() or 0) - before > self.max_bytes:
            return f"it takes more than {self.max_bytes / 1e9:.1f} GB for {self.per}"
        return ""

    def end(self) -> None:
        """End the watch; an error that was raised too late reaches the caller in here."""
        with self._turn:
            self._ended.set()
        if self.problem:
            time.sleep(0)
