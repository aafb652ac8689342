"""Calls of the system on files: heard one by one, so that tests can fail, order or count them.

`os`, `io`, `builtins` and `fcntl` are patched, at the edge of the process: nothing of lewis_hub is.
"""

from __future__ import annotations

import _io
import builtins
import fcntl
import io
import os
import re
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

BY_PATH = ("open", "stat", "lstat", "mkdir", "rmdir", "unlink", "remove", "rename", "replace")
BY_PATH += ("scandir", "listdir", "symlink", "link", "utime", "chmod")
BY_DESCRIPTOR = ("pwrite", "preadv", "posix_fallocate", "ftruncate", "fsync", "posix_fadvise")
BY_DESCRIPTOR += ("sendfile", "write")
VARIES = re.compile(r"(?<=/)(tmp|\.lewis-hub-|\.partial-|\.scratch-)\w+|[0-9a-f]{16,}")


@dataclass(frozen=True)
class Call:
    """A call, the path that it is about, and how many equal ones came before it."""

    name: str
    path: str
    before: int = 0


@contextmanager
def heard(folders, hear):
    """Call `hear` with each `Call` on a path in these folders before it is made; it may raise."""
    places = tuple(str(folder) for folder in folders)
    counted, counting, inside = Counter(), threading.Lock(), threading.local()

    def about(name, place, dir_fd=None):
        if getattr(inside, "hearing", False):
            return
        path = _path(place, dir_fd)
        if not path.startswith(places):
            return
        kind = name, VARIES.sub("*", path)
        with counting:
            before = counted[kind]
            counted[kind] += 1
        inside.hearing = True  # what `hear` does itself is not heard
        try:
            hear(Call(*kind, before))
        finally:
            inside.hearing = False

    with ExitStack() as patched:
        for module, name, replacement in _replacements(about):
            patched.enter_context(mock.patch.object(module, name, replacement))
        yield


def _path(place, dir_fd):
    """The absolute path that a call names, by descriptor or relative to one."""
    if isinstance(place, int):
        try:
            return str(Path(f"/proc/self/fd/{place}").readlink())
        except OSError:
            return ""
    path = os.fsdecode(place)
    if dir_fd is not None:
        return str(Path(_path(dir_fd, None)) / path)
    return path if path.startswith("/") else str(Path.cwd() / path)


def _replacements(about):
    """Module, name and replacement of each function that is heard."""

    def hearing(module, name):
        call = getattr(module, name)

        def replacement(*words, **options):
            place = words[0] if words else options.get("path", ".")
            about(name, place, options.get("dir_fd", options.get("src_dir_fd")))
            return call(*words, **options)

        return module, name, replacement

    yield from (hearing(os, name) for name in (*BY_PATH, *BY_DESCRIPTOR))
    yield hearing(fcntl, "flock")
    opened = _opener(io.open, about)
    for module in (io, _io, builtins):
        yield module, "open", opened


def _opener(real, about):
    """`open`, whose files tell their writes."""

    class Told(io.FileIO):
        def write(self, content):
            about("write", self.name if isinstance(self.name, str) else self.fileno())
            return super().write(content)

    def opened(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **options
    ):
        if not isinstance(file, int):
            about("open", file)
        if {*mode}.isdisjoint("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, *more, **options)
        place = file if isinstance(file, int) else os.fspath(file)
        raw = Told(place, mode.replace("b", "").replace("t", ""), *more, **options)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return opened


def recorded(folders, run):
    """All calls of a run, in order."""
    calls = []
    with heard(folders, calls.append):
        run()
    return calls


@contextmanager
def failing(folders, struck, number):
    """One call fails with an error of the system, once."""

    def hear(call):
        if call == struck:
            raise OSError(number, os.strerror(number), call.path)

    with heard(folders, hear):
        yield


def below(folder):
    """Each file in a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }
