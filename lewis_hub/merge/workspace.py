"""The output folder: it appears whole or not at all, and one run at a time works on it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lewis_hub.errors import OutputError

LOCK = ".lock"


@dataclass(frozen=True)
class Workspace:
    """Where work happens until it is whole.

    Attributes:
        output: what the folder will be called.
        folder: ``OUTPUT.partial``; what an interrupted run left is still there.
        scratch: for what does not belong to the result; gone when it is finished.
    """

    output: Path
    folder: Path
    scratch: Path

    def finish(self, files: Iterable[str]) -> Path:
        """Keep exactly `files` (relative paths) and give the folder its name.

        A folder that has the name already is replaced in two renames; the old one is deleted
        only when the new one stands.

        Raises:
            OutputError: what an interrupted run had replaced cannot be deleted.
        """
        keep = set(files)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif str(path.relative_to(self.folder)) not in keep:
                path.unlink()
        _sync(self.folder)
        replaced = self.output.with_name(self.output.name + ".replaced")
        if self.output.exists():
            _delete(replaced)
            self.output.rename(replaced)
        self.folder.rename(self.output)
        _sync(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.output

    def discard(self) -> None:
        """Keep nothing: the result is elsewhere."""
        shutil.rmtree(self.folder)


def unfinished(output: Path) -> Path:
    """Where work on an output happens."""
    return output.with_name(output.name + ".partial")


@contextmanager
def open_workspace(output: Path, *, replace: bool) -> Iterator[Workspace]:
    """Work on `output` alone; leaving without `finish` keeps what was done, if anything was.

    Raises:
        OutputError: it exists and is not to be replaced, another run works on it, or the
            folder cannot be written.
    """
    output = output.resolve()
    if output.exists() and not replace:
        raise OutputError(
            str(output),
            "it exists and holds something else than this merge.",
            "Name another folder with -o, or replace it with --force.",
        )
    folder = unfinished(output)
    try:
        (folder / ".scratch").mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise OutputError(
            str(output),
            f"it cannot be written ({error.strerror}).",
            "Name a folder that you may write to with -o.",
        ) from None
    with alone_in(folder, output):
        try:
            yield Workspace(output, folder, folder / ".scratch")
        except BaseException:
            if not any(path.is_file() and path != folder / LOCK for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def alone_in(folder: Path, output: Path) -> Iterator[None]:
    """Hold the lock of a folder that is there; `output` is what messages call it.

    Raises:
        OutputError: another run works on it.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                str(output),
                "another run is working on it.",
                "Wait until it ends, or name another folder with -o.",
            ) from None
        yield
    finally:
        os.close(lock)


def _delete(folder: Path) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        problem = f"an interrupted run left it, and it cannot be deleted ({error.strerror})."
        remedy = "Delete it, then run again: what was made is kept."
        raise OutputError(str(folder), problem, remedy) from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
