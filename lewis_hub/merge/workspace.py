"""The output folder: it appears when it is complete, and one run at a time works on it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lewis_hub.errors import OutputError
from lewis_hub.files import unwritable

LOCK = ".lock"


@dataclass(frozen=True)
class Workspace:
    """The folder in which a run works."""

    output: Path  # the path of the finished folder
    folder: Path  # OUTPUT.partial; it still has the files of an interrupted run
    scratch: Path  # for files that are not part of the output

    def finish(self, files: Iterable[str]) -> Path:
        """Delete all but `files` (relative paths) and rename the folder to `output`.

        An older folder of this name is deleted after the new one has its name.

        Raises:
            OutputError: an older folder that an interrupted run replaced cannot be deleted.
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
            if replaced.exists():
                try:
                    shutil.rmtree(replaced)
                except OSError as error:
                    problem = (
                        f"an interrupted run left it, and it cannot be deleted ({error.strerror})."
                    )
                    remedy = "Delete it, then run again: what was made is kept."
                    raise OutputError(str(replaced), problem, remedy) from None
            self.output.rename(replaced)
        self.folder.rename(self.output)
        _sync(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.output

    def discard(self) -> None:
        """Delete the folder: the result is elsewhere."""
        shutil.rmtree(self.folder)


def unfinished(output: Path) -> Path:
    """The folder in which runs for this output work."""
    return output.with_name(output.name + ".partial")


def parts_folder(output: Path) -> Path:
    """The folder of the merges that are made for this output."""
    return output.with_name(output.name + ".parts")


@contextmanager
def open_workspace(output: Path, *, replace: bool) -> Iterator[Workspace]:
    """Open the workspace of `output`. After an error its files are kept, if there are any.

    Raises:
        OutputError: the output exists and `replace` is false, another run works on it, or the
            folder cannot be written.
    """
    output = output.resolve()
    if output.exists() and not replace:
        problem = "it exists and holds something else than this merge."
        remedy = "Name another folder with -o, or replace it with --force."
        raise OutputError(str(output), problem, remedy)
    folder = unfinished(output)
    try:
        (folder / ".scratch").mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise unwritable(output, error) from None
    with alone_in(folder, output):
        try:
            yield Workspace(output, folder, folder / ".scratch")
        except BaseException:
            if not any(path.is_file() and path != folder / LOCK for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def alone_in(folder: Path, output: Path) -> Iterator[None]:
    """Lock an existing folder, or raise an OutputError that names `output`."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "Wait until it ends, or name another folder with -o."
            raise OutputError(str(output), "another run is working on it.", remedy) from None
        yield
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
