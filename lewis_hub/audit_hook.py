"""Keeps libraries inside a folder while they load a model of others, by an audit hook (PEP 578).

Settings in the files of a model make transformers and sentence-transformers open other files. The
hook sees every file that Python code opens, and every connection that it makes. It sees no file
that a library opens in C or Rust.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from traceback import walk_stack
from typing import Any

from lewis_hub.errors import SourceError
from lewis_hub.files import require_inside

EVENTS = frozenset(  # of several hundred: most, such as that of `id`, are far more frequent
    ("open", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
)
PROGRAMS = (  # what is the same for all users, without secrets
    *("/usr/lib", "/usr/lib64", "/usr/share", "/lib", "/lib64", "/nix", "/sys"),
    *("/System", "/Library"),
    *("/etc/localtime", "/etc/mime.types", "/etc/os-release", "/etc/timezone"),
    *(os.devnull, "/dev/urandom", "/proc/driver", "/proc/sys"),
    *("/proc/cpuinfo", "/proc/filesystems", "/proc/meminfo", "/proc/mounts", "/proc/stat"),
    *("/proc/self/cgroup", "/proc/self/maps", "/proc/self/mountinfo", "/proc/self/mounts"),
    *("/proc/self/stat", "/proc/self/statm", "/proc/self/status", "/proc/version"),
)
# what these functions open is not of a model: modules and what they read at once, logs
NOT_OF_A_MODEL = {
    ("<frozen importlib._bootstrap>", "_find_and_load"),
    (logging.Logger.callHandlers.__code__.co_filename, "callHandlers"),
}
NEW = os.O_CREAT | os.O_EXCL
REMEDY = "Its settings lead there; only the files of a model are used. Remove them in a copy."

_thread = threading.local()


class _OutsideError(PermissionError):
    """A library may go on without the file, as without any that it may not read."""


@contextmanager
def confined_to(folder: Path) -> Iterator[None]:
    """Let code of this thread open only files of a folder and of installed packages.

    What a package opens when it is imported is allowed, and what a log writes. Connections are
    refused.

    Raises:
        SourceError: the block failed, as it opened another file or a connection.
    """
    _install()
    before = getattr(_thread, "rule", None)
    _thread.rule = _Rule.of(folder)
    try:
        yield
    except Exception as error:
        if outside := _cause(error):
            problem = f"to load it opens {outside.filename}, which is no file of this model"
            raise SourceError(str(folder), problem, REMEDY) from error
        raise
    finally:
        _thread.rule = before


def _cause(error: BaseException | None) -> _OutsideError | None:
    """What was refused, and so made other errors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, _OutsideError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@cache
def _install() -> None:
    """Install the hook, once: Python has no way to remove it."""
    sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    rule: _Rule | None = getattr(_thread, "rule", None)
    if rule is None:
        return
    if event != "open":
        refused = f"a connection to {args[0] if isinstance(args[0], str) else args[-1]}"
    elif isinstance(args[0], int) or rule.allows(os.fsdecode(args[0]), args[2]):
        return
    else:
        refused = os.fsdecode(args[0])
    if _n_exempt() == rule.n_exempt:
        raise _OutsideError(errno.EACCES, "no file of the model", refused)


def _n_exempt() -> int:
    """The functions of NOT_OF_A_MODEL in which this thread is."""
    frames = (frame.f_code for frame, _ in walk_stack(sys._getframe()))
    return sum((code.co_filename, code.co_name) in NOT_OF_A_MODEL for code in frames)


@dataclass(frozen=True)
class _Rule:
    """What a block may open."""

    folders: Sequence[Path]  # the folder as it is written, and without links
    packages: Set[str]
    temporary: str  # the folder for temporary files; new ones are allowed
    n_exempt: int  # functions in which the block itself is run, such as the import of a script

    @classmethod
    def of(cls, folder: Path) -> _Rule:
        folders = Path(_plain(folder)), Path(os.path.realpath(folder))
        return cls(folders, _packages(), os.path.realpath(tempfile.gettempdir()), _n_exempt())

    def allows(self, path: str, flags: int) -> bool:
        whole = Path.cwd() / path
        if _is_in(_plain(whole), self.packages):
            return True
        for folder in self.folders:
            if whole.is_relative_to(folder):
                return _is_own(folder, whole)
        if flags & NEW == NEW:
            return _is_in(os.path.realpath(path), {self.temporary})
        return whole.is_dir()  # has no content; Python names it for a file without a name


def _is_own(folder: Path, path: Path) -> bool:
    """Whether it is a file of the folder, or does not exist."""
    try:
        require_inside(folder, path, SourceError)
    except SourceError:
        return not os.path.lexists(path)
    return True


def _packages() -> set[str]:
    """The folders from which Python and its packages are loaded.

    The working folder and that of the script are in the path of Python, too, and may have any file.
    """
    modules = list(sys.modules.items())
    ways = [getattr(one, "__path__", ()) for name, one in modules if "." not in name]
    found = {*sys.path, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *PROGRAMS}
    found |= {str(place) for way in ways for place in way}
    script = getattr(sys.modules["__main__"], "__file__", None) or ""  # a notebook has none
    yours = {str(Path.cwd()), str(Path(script).parent)}
    return _both_forms(found) - _both_forms(yours) - {os.sep}


def _both_forms(places: Set[str]) -> set[str]:
    """Folders as they are written, and without links."""
    return {form(place) for place in places if place for form in (_plain, os.path.realpath)}


def _plain(path: str | Path) -> str:
    """An absolute path without `..`, whatever is a link in it."""
    return os.path.normpath(Path(path).absolute())


def _is_in(path: str, folders: Set[str]) -> bool:
    return any(path == one or path.startswith(one + os.sep) for one in folders)
