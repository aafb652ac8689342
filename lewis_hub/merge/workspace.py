"""The output folder: it appears when it is complete, and one run at a time works on it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lewis_hub.documents import MAX_JSON_BYTES, read_json
from lewis_hub.errors import OtherOutputError, OutputError
from lewis_hub.files import require_no_links, text_of, unwritable, write_whole
from lewis_hub.system import create_binary, rename_folder, sync_folder, try_lock

LOCK = ".lock"
SCRATCH = ".lewis-hub-scratch-"
STATES = "sources.json"  # in the scratch folder


@dataclass(frozen=True)
class Workspace:
    """The folder in which a run works."""

    output: Path  # the path of the finished folder
    folder: Path  # OUTPUT.partial; it still has the files of an interrupted run
    scratch: Path  # for files that are not part of the output

    def resume(self, states: Mapping[str, str]) -> None:
        """Keep what an interrupted run made, unless it may have read other bytes of a local file.

        Shards and measurements are known by the digests of the files as they were before the run.

        Args:
            states: path -> state of a file, which changes with each write. Files that the
                interrupted run did not read count as unchanged.
        """

        def empty() -> None:
            shutil.rmtree(self.folder)
            self.scratch.mkdir(parents=True)

        keep_unless_written(self.scratch / STATES, states, empty)

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
        shutil.rmtree(self.folder)


def keep_unless_written(note: Path, states: Mapping[str, str], discard: Callable[[], None]) -> None:
    """Note the states of files that a run reads; call `discard` if the run before had others.

    Args:
        note: file of the states, kept until the run is complete.
        states: path -> state of a file, which changes with each write. Files that the run before
            did not read count as unchanged.
        discard: deletes what the run before made.
    """
    try:
        known = dict(read_json(text_of(note, MAX_JSON_BYTES)))
    except (OSError, ValueError, TypeError):
        known = {}
    if any(known.get(path, state) != state for path, state in states.items()):
        discard()
        known = {}
    if states:
        write_whole(note, json.dumps({**known, **states}))


def beside(output: Path, ending: str) -> Path:
    """The folder beside an output that has its name and an ending.

    Raises:
        OutputError: the output is the root of a disk.
    """
    path = output.resolve() if output.name in ("", "..") else output
    if not path.name:
        problem = "it is the root of a disk"
        raise OutputError(str(output), problem, "Name a folder in it with -o.")
    return path.with_name(path.name + ending)


def unfinished(output: Path) -> Path:
    """The folder in which runs for this output work."""
    return beside(output, ".partial")


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for one run, which is alone at `folder`; first, delete those of killed runs."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as made:
        yield Path(made)


def parts_folder(output: Path) -> Path:
    """The folder of the merges that are made for this output."""
    return beside(output, ".parts")


@contextmanager
def open_workspace(output: Path, *, replace: bool | None) -> Iterator[Workspace]:
    """Open the workspace of `output`. After an error its files are kept, if there are any.

    `replace` is None for a command that never replaces an output.

    Raises:
        OutputError: the output exists and `replace` is not true, another run works on it, the
            folder cannot be written, or it is a link or has one in it.
    """
    if output.is_symlink():
        problem = f"it is a link to {os.path.realpath(output)}"
        raise OutputError(str(output), problem, "Name that folder itself with -o, or delete it.")
    output = output.resolve()
    _require_free(output, replace=replace)
    folder = unfinished(output)
    # The lock is beside the folder: another run could take one in it while `finish` renames it.
    with alone_at(lock_beside(output), output):
        _require_free(output, replace=replace)  # another run may have finished it meanwhile
        require_no_links(folder)
        try:
            (folder / ".scratch").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(output, error) from None
        try:
            yield Workspace(output, folder, folder / ".scratch")
        except BaseException:
            if not any(path.is_file() for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def alone_with(output: Path) -> Iterator[None]:
    """Inside the block no other run replaces, changes or publishes a finished output.

    Where no file can be made beside it, as with a full quota, no run can replace it.

    Raises:
        OutputError: another run works on it.
    """
    lock = lock_beside(output.resolve())
    with ExitStack() as held:
        try:
            if lock.parent.is_dir():
                held.enter_context(alone_at(lock, output))
        except OutputError:
            if os.path.lexists(lock):
                raise
        yield


def lock_beside(output: Path) -> Path:
    """The file beside an output that a run locks while it works on it."""
    return output.parent / f".{output.name}{LOCK}"


def _require_free(output: Path, *, replace: bool | None) -> None:
    if replace or not output.exists():
        return
    problem, other = "it exists already.", "delete it."
    if replace is not None:
        problem = "it exists and holds something else than this merge."
        other = "replace it with --force."
    raise OtherOutputError(str(output), problem, f"Name another folder with -o, or {other}")


@contextmanager
def alone_at(lock: Path, output: Path) -> Iterator[None]:
    """Lock a file, which is created and at the end deleted.

    Raises:
        OutputError: another run has locked it, or it cannot be created; `where` is the output.
    """
    try:
        if not lock.parent.exists():
            lock.parent.mkdir(parents=True, exist_ok=True)
        opened = _locked(lock)
    except BlockingIOError:
        remedy = "Wait until it ends, or name another folder with -o."
        raise OutputError(str(output), "another run is working on it.", remedy) from None
    except OSError as error:
        raise unwritable(output, error) from None
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # before it is closed, so that it is this run's
        os.close(opened)


def _locked(lock: Path) -> int:
    """Open and lock a file; a BlockingIOError if another run has locked it."""
    while True:
        opened = create_binary(lock, os.O_RDWR)
        try:
            if not try_lock(opened):
                raise BlockingIOError
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened), lock.stat()):
                    return opened  # else a run that ended has deleted it after it was opened here
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)
