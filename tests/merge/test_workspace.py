import errno
import fcntl
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from lewis_hub.errors import OutputError
from lewis_hub.files import write_whole
from lewis_hub.merge import workspace
from lewis_hub.merge.workspace import alone_at, alone_with, open_workspace, parts_folder


def test_the_folder_appears_with_exactly_the_files_that_belong_to_it(tmp_path):
    output = tmp_path / "merged"
    with open_workspace(output, replace=False) as work:
        (work.folder / "lewis").mkdir()
        (work.folder / "lewis" / "lock.json").write_text("{}")
        (work.folder / "model.safetensors").write_text("weights")
        (work.folder / "model-00001-of-00002.safetensors").write_text("of an older recipe")
        (work.scratch / "twin").mkdir()
        (work.scratch / "twin" / "model.safetensors").write_text("twin")
        assert not output.exists()

        work.finish(["lewis/lock.json", "model.safetensors"])

    found = sorted(
        path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()
    )
    assert found == ["lewis/lock.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_an_interrupted_run_keeps_what_was_done(tmp_path):
    def interrupted():
        with open_workspace(tmp_path / "merged", replace=False) as work:
            (work.folder / "shard").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    with open_workspace(tmp_path / "merged", replace=False) as work:
        assert (work.folder / "shard").read_text() == "done"
    assert not (tmp_path / "merged").exists()


def test_two_runs_on_one_output_the_second_stops(tmp_path):
    with (
        open_workspace(tmp_path / "merged", replace=False),
        pytest.raises(OutputError) as caught,
        open_workspace(tmp_path / "merged", replace=False),
    ):
        pass

    assert str(caught.value) == (
        f"{tmp_path / 'merged'}: another run is working on it.\n"
        "Wait until it ends, or name another folder with -o."
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EACCES])
def test_a_finished_output_is_published_where_no_file_can_be_made(tmp_path, monkeypatch, number):
    def refuse(path, flags=0):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(workspace, "create_binary", refuse)
    (tmp_path / "merged").mkdir()

    with alone_with(tmp_path / "merged"):
        pass
    with alone_with(tmp_path / "none" / "merged"):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_is_worked_on_without_one(tmp_path, monkeypatch, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "merged").mkdir()
    works = (alone_with(tmp_path / "merged"), open_workspace(tmp_path / "other", replace=False))

    for work in works:
        refusal = pytest.raises(OutputError, match=r"cannot be written \(Input/output error\)")
        with refusal if number == errno.EIO else nullcontext(), work:
            pass


@pytest.mark.parametrize("replace", [False, True])
def test_no_run_begins_while_another_finishes(tmp_path, monkeypatch, replace):
    output, refusals, rename = tmp_path / "merged", [], Path.rename
    if replace:
        output.mkdir()

    def interleaved(path, target):
        with (
            pytest.raises(OutputError) as caught,
            open_workspace(output, replace=replace) as other,
        ):
            (other.folder / "shard").write_text("other")
        refusals.append(caught.value.problem)
        return rename(path, target)

    with open_workspace(output, replace=replace) as work:
        (work.folder / "shard").write_text("first")
        monkeypatch.setattr(Path, "rename", interleaved)
        work.finish(["shard"])
        monkeypatch.undo()

    assert refusals == ["another run is working on it."] * (2 if replace else 1)
    assert (output / "shard").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_lock_that_was_deleted_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    lock, flock = tmp_path / ".lock", fcntl.flock

    def late(opened, how):
        monkeypatch.undo()
        lock.unlink()  # by a run that ended between this one's open and flock
        flock(opened, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        alone_at(lock, tmp_path / "merged"),
        pytest.raises(OutputError, match="another run is working on it"),
        alone_at(lock, tmp_path / "merged"),
    ):
        pass
    assert not lock.exists()


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "precious").write_text("old")

    with pytest.raises(OutputError) as caught, open_workspace(output, replace=False):
        pass
    assert str(caught.value) == (
        f"{output}: it exists and holds something else than this merge.\n"
        "Name another folder with -o, or replace it with --force."
    )
    assert (output / "precious").read_text() == "old"

    with pytest.raises(OutputError) as caught, open_workspace(output, replace=None):
        pass
    assert str(caught.value) == (
        f"{output}: it exists already.\nName another folder with -o, or delete it."
    )

    with open_workspace(output, replace=True) as work:
        (work.folder / "new").write_text("new")
        work.finish(["new"])
    assert [path.name for path in output.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_what_a_killed_run_had_put_aside_is_not_in_the_way(tmp_path):
    for name in ("merged", "merged.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)

    with open_workspace(tmp_path / "merged", replace=True) as work:
        (work.folder / "new").write_text("new")
        work.finish(["new"])

    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")

    with (
        pytest.raises(OutputError) as caught,
        open_workspace(tmp_path / "file" / "merged", replace=False),
    ):
        pass

    path, reason = tmp_path / "file" / "merged", caught.value.problem.partition("(")[2]
    assert reason.casefold() in ("not a directory)", "the system cannot find the path specified)")
    assert str(caught.value) == (
        f"{path}: it cannot be written ({reason}.\nName a folder that you may write to with -o."
    )


def fail(output, name):
    with open_workspace(output, replace=False) as workspace:
        if name:
            (workspace.scratch / name).write_text("{}")
        raise OutputError("here", "it failed.", "Try again.")


def test_a_run_that_fails_before_it_made_anything_leaves_no_folder(tmp_path):
    with pytest.raises(OutputError):
        fail(tmp_path / "merged", "")

    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_run_made_stays_for_the_next(tmp_path):
    with pytest.raises(OutputError):
        fail(tmp_path / "merged", "importance.json")

    assert (tmp_path / "merged.partial" / ".scratch" / "importance.json").read_text() == "{}"


def elsewhere(tmp_path):
    """A folder with a file that nobody may touch."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "place", ["merged.partial", "merged.partial/config.json", "merged.partial/.scratch/fitted"]
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_links_that_came_with_a_recipe_are_not_followed(tmp_path, place, kind):
    folder = elsewhere(tmp_path)
    link = tmp_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder if kind == "folder" else folder / "thesis.txt")

    with pytest.raises(OutputError) as caught, open_workspace(tmp_path / "merged", replace=True):
        pass

    problem = "it is a link, and files are written only in folders that you name."
    remedy = "Delete it, or name another folder with -o."
    assert str(caught.value) == f"{link}: {problem}\n{remedy}"
    assert (folder / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_an_output_that_is_a_link_is_refused(tmp_path, replace):
    folder, output = elsewhere(tmp_path), tmp_path / "merged"
    output.symlink_to(folder)

    with (
        pytest.raises(OutputError, match=r"it is a link to .*elsewhere"),
        open_workspace(output, replace=replace),
    ):
        pass

    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(tmp_path):
    (tmp_path / ".merged.lock").symlink_to(tmp_path / "made")

    with (
        pytest.raises(OutputError, match="cannot be written"),
        open_workspace(tmp_path / "merged", replace=False),
    ):
        pass

    assert not (tmp_path / "made").exists()


def test_a_fifo_in_the_way_is_refused(tmp_path):
    (tmp_path / "merged.partial").mkdir()
    os.mkfifo(tmp_path / "merged.partial" / "model.safetensors")

    with (
        pytest.raises(OutputError, match="it is a FIFO, a socket or a device"),
        open_workspace(tmp_path / "merged", replace=False),
    ):
        pass


def test_a_file_is_written_in_the_place_of_a_link(tmp_path):
    own = elsewhere(tmp_path) / "thesis.txt"
    (tmp_path / "lock.json").symlink_to(own)

    write_whole(tmp_path / "lock.json", "{}")

    assert (own.read_text(), (tmp_path / "lock.json").is_symlink()) == ("mine", False)
    (tmp_path / "lock.json.new").symlink_to(own)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "lock.json", "{}")
    assert own.read_text() == "mine"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")

    with (
        pytest.raises(OutputError, match="it exists and holds"),
        open_workspace(Path(name), replace=False),
    ):
        pass
    if name == "/":
        with pytest.raises(OutputError, match="it is the root of a disk"):
            parts_folder(Path(name))
    else:
        folder = Path(name).resolve()
        assert parts_folder(Path(name)) == folder.with_name(f"{folder.name}.parts")
