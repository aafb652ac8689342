"""What code may open, by an audit hook (PEP 578).

Settings in the files of a model make transformers and sentence-transformers open other files:
libraries are kept inside a folder while they load a model of others. The Python of a user's tasks
may open the files that the tasks name.

The hook sees every file that Python code opens, and every connection that it makes. It sees no file
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
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.util import source_from_cache
from pathlib import Path, PurePath
from traceback import walk_stack
from typing import Any

from lewis_hub.errors import SourceError
from lewis_hub.files import is_hidden, require_inside

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
SYSTEM = ("/dev", "/etc", "/proc", "/run", "/sys", "/var")
INSTALLED_DATA = "nltk_data"  # as NLTK names its folder, wherever it is
NEW = os.O_CREAT | os.O_EXCL
REMEDY = "Its settings lead there; only the files of a model are used. Remove them in a copy."

_thread = threading.local()
_reads: _Reads | None = None


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


@contextmanager
def opening_only(
    named: Callable[[], Collection[Path]], folder: Path, *, elsewhere: bool
) -> Iterator[Sequence[str]]:
    """Let Python files in a folder read only the files of it that are `named`, in all threads.

    Files elsewhere they may read if `elsewhere` is true; else only those of packages, of the
    system, of caches and hidden ones. Files whose code calls this are not meant. Yields the paths
    that were refused so far: code may go on without a file.
    """
    global _reads
    _install()
    _packages_at_first()
    rule = _Reads(_real(folder), named, elsewhere, frozenset(_files_at_work()))
    before, _reads = _reads, rule
    try:
        yield rule.refused
    finally:
        _reads = before


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
    if _reads and event == "open" and not isinstance(args[0], int):
        _reads.require(os.fsdecode(args[0]), args[2])
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
        folders = Path(_plain(folder)), Path(_real(folder))
        return cls(folders, _packages(), _real(tempfile.gettempdir()), _n_exempt())

    def allows(self, path: str, flags: int) -> bool:
        whole = Path.cwd() / path
        if ".." in whole.parts:  # a folder may be named so; the file itself may be a link
            whole = Path(_real(whole.parent), whole.name)
        if _is_in(_plain(whole), self.packages):
            return True
        for folder in self.folders:
            if whole.is_relative_to(folder):
                return _is_own(folder, whole)
        if flags & NEW == NEW:
            return _is_in(_real(path), {self.temporary})
        return whole.is_dir()  # has no content; Python names it for a file without a name


@dataclass(frozen=True)
class _Reads:
    """What the Python files in a folder may read."""

    folder: str  # without links
    named: Callable[[], Collection[Path]]
    elsewhere: bool
    callers: Set[str]  # files of the code that asked for this rule
    refused: list[str] = field(default_factory=list)

    def require(self, path: str, flags: int) -> None:
        """Raise an error if a Python file of the folder opens what it may not read."""
        if flags & os.O_WRONLY:
            return
        file = _source(_real(path))
        is_beside = _is_in(file, {self.folder})
        if (not is_beside and self.elsewhere) or not self._is_asking() or not Path(file).is_file():
            return
        if file not in self._named and not self._is_of_the_machine(file, is_beside=is_beside):
            self.refused.append(file)
            raise _OutsideError(errno.EACCES, "no file that the task names", file)

    def _is_asking(self) -> bool:
        """Whether Python of the folder is at work."""
        files = _files_at_work() - self.callers
        own = [real for file in files if _is_in(real := _real_cached(file), {self.folder})]
        return any(not _is_in(file, self._installed_beside) for file in own)

    def _is_of_the_machine(self, file: str, *, is_beside: bool) -> bool:
        """Whether it is of a package, the system or a cache, hidden, or data of a package.

        The project of the task may itself be in a hidden or temporary folder.
        """
        if is_beside:
            return _is_in(file, self._installed_beside)
        project = str(Path(self.folder).parent)
        is_near = _is_in(file, {project})
        inner = Path(file).relative_to(project if is_near else Path(file).anchor)
        installed = self._installed_in(project) if is_near else self._installed
        return is_hidden(inner) or INSTALLED_DATA in inner.parts or _is_in(file, installed)

    @cached_property
    def _named(self) -> Set[str]:
        global _reads
        before, _reads = _reads, None  # to find them, files are read
        try:
            return {_real(file) for file in self.named()}
        finally:
            _reads = before

    @cached_property
    def _installed_beside(self) -> Set[str]:
        return self._installed_in(self.folder)

    def _installed_in(self, around: str) -> Set[str]:
        """Packages and caches that are in a folder, and not around it."""
        return {one for one in self._installed if one != around and _is_in(one, {around})}

    @cached_property
    def _installed(self) -> Set[str]:
        own = _real(Path(__file__).parent)
        return {*_packages_at_first(), own, _real(sys.prefix), *map(_real, _caches()), *SYSTEM}


@cache
def _packages_at_first() -> Set[str]:
    """The folders of packages before any task has put its own into the path of Python."""
    return frozenset(_packages())


def _files_at_work() -> set[str]:
    """The files of the functions that are called in this thread."""
    return {frame.f_code.co_filename for frame, _ in walk_stack(sys._getframe())}


def _source(file: str) -> str:
    """The Python file of a compiled one; any other file itself."""
    if PurePath(file).parent.name == "__pycache__":
        with suppress(ValueError, NotImplementedError):
            return source_from_cache(file)
    return file


def _caches() -> Iterator[str]:
    """The folders with what libraries fetched, and for temporary files."""
    from huggingface_hub import constants

    yield from (constants.HF_HOME, constants.HF_HUB_CACHE, tempfile.gettempdir())
    if datasets := sys.modules.get("datasets.config"):
        yield str(datasets.HF_CACHE_HOME)
        yield str(datasets.HF_DATASETS_CACHE)


@lru_cache(maxsize=10_000)
def _real_cached(file: str) -> str:
    return _real(file)


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
    return {form(place) for place in places if place for form in (_plain, _real)}


def _plain(path: str | Path) -> str:
    """An absolute path without `..`, whatever is a link in it."""
    return os.path.normcase(os.path.normpath(Path(path).absolute()))  # Windows has no case


def _real(path: str | Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def _is_in(path: str, folders: Set[str]) -> bool:
    return any(path == one or path.startswith(one + os.sep) for one in folders)
