"""The output folder: it appears when it is complete, and one run at a time works on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lewis_hub.errors import OutputError
from lewis_hub.files import unwritable
from lewis_hub.system import MOVES_OPEN_FILES, open_binary, rename_folder, sync_folder, try_lock

LOCK = ".lock"


class FolderLock:
    """An open file in a folder, which keeps other runs out of it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = open_binary(folder / LOCK, os.O_RDWR | os.O_CREAT)
        self._is_open = True
        self.is_held = try_lock(self._descriptor)

    def close(self) -> None:
        """Let other runs in; it may be called twice."""
        if self._is_open:
            os.close(self._descriptor)
        self._is_open = False

    def let_folder_go(self) -> None:
        """Close before the folder is renamed or deleted, where an open file would prevent it."""
        if not MOVES_OPEN_FILES:
            self.close()


@dataclass(frozen=True)
class Workspace:
    """The folder in which a run works."""

    output: Path  # the path of the finished folder
    folder: Path  # OUTPUT.partial; it still has the files of an interrupted run
    scratch: Path  # for files that are not part of the output
    lock: FolderLock

    def finish(self, files: Iterable[str]) -> Path:
        """Delete all but `files` (relative paths) and rename the folder to `output`.

        An older folder of this name is deleted after the new one has its name.

        Raises:
            OutputError: an older folder that an interrupted run replaced cannot be deleted.
        """
        keep = set(files)
        self.lock.let_folder_go()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in keep:
                path.unlink()
        sync_folder(self.folder)
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
            rename_folder(self.output, replaced)
        rename_folder(self.folder, self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.output

    def discard(self) -> None:
        """Delete the folder: the result is elsewhere."""
        self.lock.let_folder_go()
        shutil.rmtree(self.folder)


def unfinished(output: Path) -> Path:
    """The folder in which runs for this output work."""
    return output.with_name(output.name + ".partial")


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
    with alone_in(folder, output) as lock:
        try:
            yield Workspace(output, folder, folder / ".scratch", lock)
        except BaseException:
            if not any(path.is_file() and path != folder / LOCK for path in folder.rglob("*")):
                lock.let_folder_go()
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def alone_in(folder: Path, output: Path) -> Iterator[FolderLock]:
    """Lock an existing folder, or raise an OutputError that names `output`."""
    lock = FolderLock(folder)
    try:
        if not lock.is_held:
            remedy = "Wait until it ends, or name another folder with -o."
            raise OutputError(str(output), "another run is working on it.", remedy)
        yield lock
    finally:
        lock.close()
