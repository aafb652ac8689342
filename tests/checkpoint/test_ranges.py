import os
import random
import threading
import time
from pathlib import Path

import pytest
from hub_models import folder_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.checkpoint import ranges
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import SourceFiles, SourceTensor, scratch_bytes
from lewis_hub.errors import OutputError, SourceError


class Remote:
    """Files that are given out by ranges, in pieces; `asked` keeps the ranges."""

    def __init__(self, files):
        self.files = files
        self.asked = []

    def fetch(self, file, start, stop, take):
        self.asked.append((file, start, stop))
        for position in range(start, stop, 7):
            take(position, self.files[file][position : min(position + 7, stop)])


ROOM = 64  # bytes


@pytest.fixture
def small(monkeypatch):
    """Requests of 16 bytes, of which four fit into the room."""
    monkeypatch.setattr(ranges, "N_REQUESTS", 4)


def stored(source, file, start, stop):
    return SourceTensor(source, TensorHeader("t", "U8", (stop - start,), file, start, stop - start))


def read(files, tensor):
    content = bytearray(tensor.header.n_bytes)
    files.reader(tensor.source).read(tensor.header, 0, memoryview(content))
    return bytes(content)


def tensors_of(most_start, most_bytes):
    return st.builds(
        lambda source, file, start, n: stored(source, file, start, start + n),
        st.sampled_from("ab"),
        st.sampled_from(["one", "two"]),
        st.integers(0, most_start),
        st.integers(0, most_bytes),
    )


tensors = tensors_of(150, 50)


@settings(deadline=None)
@given(steps=st.lists(st.lists(tensors, max_size=4), max_size=8))
def test_every_step_reads_its_bytes_as_often_as_it_likes_and_leaves_nothing(
    steps, tmp_path_factory
):
    scratch = tmp_path_factory.mktemp("files") / "ranges"
    dice = random.Random(1)
    held = {source: {name: dice.randbytes(200) for name in ("one", "two")} for source in "ab"}
    locations = {source: Remote(files).fetch for source, files in held.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "N_REQUESTS", 4)
        with SourceFiles(locations, steps, scratch, ROOM) as files:
            for step in steps:
                for tensor in [*step, *reversed(step)]:
                    header = tensor.header
                    expected = held[tensor.source][header.shard][header.start :]
                    assert read(files, tensor) == expected[: header.n_bytes]
                files.step_done()
    assert not scratch.exists()


def test_a_request_that_begins_while_the_files_are_closed_leaves_nothing(tmp_path, monkeypatch):
    begins, rmdir = threading.Event(), os.rmdir

    class Slow(dict):
        def __getitem__(self, source):
            if threading.current_thread() is not threading.main_thread():
                begins.wait()
            return super().__getitem__(source)

    def delete_slowly(path, **given):
        begins.set()
        time.sleep(0.2)  # for a file that should not be created
        rmdir(path, **given)

    locations = Slow(a=Remote({"f": bytes(20)}).fetch)
    with SourceFiles(locations, [[stored("a", "f", 0, 20)]], tmp_path / "ranges", ROOM):
        monkeypatch.setattr(os, "rmdir", delete_slowly)

    assert not (tmp_path / "ranges").exists()


def test_neighbours_come_by_one_request_and_a_large_tensor_by_several(small, tmp_path):
    held = Remote({"f": bytes(range(100))})
    steps = [[stored("a", "f", 0, 5)], [stored("a", "f", 5, 12)], [stored("a", "f", 12, 60)]]

    with SourceFiles({"a": held.fetch}, steps, tmp_path / "ranges", ROOM) as files:
        assert read(files, steps[2][0]) == bytes(range(12, 60))

    assert sorted(held.asked) == [("f", 0, 16), ("f", 16, 32), ("f", 32, 48), ("f", 48, 60)]


def test_no_more_lies_ready_than_there_is_room_for(small, tmp_path):
    held = Remote({"f": bytes(400)})
    steps = [[stored("a", "f", i * 20, i * 20 + 10)] for i in range(20)]  # gaps: a request each
    most, room = 0, threading.Event()

    with SourceFiles({"a": held.fetch}, steps, tmp_path / "ranges", ROOM) as files:
        for i, (tensor,) in enumerate(steps):
            read(files, tensor)
            room.wait(0.01)  # for requests that should not be sent
            most = max(most, len(held.asked) - i)
            files.step_done()

    assert most == 6  # of 10 bytes each, in 64
    assert scratch_bytes({"a": held.fetch}, steps, ROOM) == 64


def test_a_step_that_needs_more_than_there_is_room_for_gets_it_alone(small, tmp_path):
    held = Remote({"f": bytes(1000)})
    steps = [[stored("a", "f", 0, 304)], [stored("a", "f", 304, 608)], [stored("a", "f", 608, 912)]]

    with SourceFiles({"a": held.fetch}, steps, tmp_path / "ranges", ROOM) as files:
        for (tensor,) in steps:
            assert len(read(files, tensor)) == 304
            assert (
                max(stop for _, _, stop in held.asked)
                == tensor.header.start + tensor.header.n_bytes
            )
            files.step_done()

    assert scratch_bytes({"a": held.fetch}, steps, ROOM) == 304


def test_a_failed_request_is_told_to_the_thread_that_reads_and_the_files_close(small, tmp_path):
    def fetch(file, start, stop, take):
        raise SourceError("a@1", "the Hub is down", "Wait.")

    tensor = stored("a", "f", 0, 10)
    with (
        pytest.raises(SourceError, match="the Hub is down"),
        SourceFiles({"a": fetch}, [[tensor]], tmp_path / "ranges", ROOM) as files,
    ):
        read(files, tensor)

    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written_in_parts(monkeypatch):
    """The system writes two bytes at most, as where a disk becomes full and has room again."""
    name = "pwrite" if hasattr(os, "pwrite") else "write"
    whole = getattr(os, name)

    def part(descriptor, content, *position):
        return whole(descriptor, content[:2], *position)

    monkeypatch.setattr(os, name, part)


@pytest.mark.usefixtures("written_in_parts")
def test_bytes_that_the_system_writes_in_parts_are_all_there(small, tmp_path):
    content = bytes(range(1, 41))
    step = [stored("a", "one", 0, 40)]

    with SourceFiles({"a": Remote({"one": content}).fetch}, [step], tmp_path / "r", ROOM) as files:
        assert read(files, step[0]) == content


def test_bytes_that_another_process_cut_off_are_told(small, tmp_path):
    remote, step = Remote({"one": bytes(40)}), [stored("a", "one", 0, 40)]

    with SourceFiles({"a": remote.fetch}, [step], tmp_path / "r", ROOM) as files:
        read(files, step[0])
        os.truncate(tmp_path / "r" / "2", 3)
        with pytest.raises(OutputError, match="2: another process truncated it while it was read"):
            read(files, step[0])


def test_closing_waits_for_nobody_and_what_was_killed_leaves_no_file(small, tmp_path):
    (tmp_path / "ranges").mkdir()
    (tmp_path / "ranges" / "0").write_bytes(b"of a killed run")
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def fetch(file, start, stop, take):
        begun.set()
        go_on.wait()
        try:
            take(0, b"x")
        finally:
            ended.set()

    with SourceFiles({"a": fetch}, [[stored("a", "f", 0, 10)]], tmp_path / "ranges", ROOM):
        begun.wait()
        assert [path.read_bytes() for path in (tmp_path / "ranges").iterdir()] == [b""]
    go_on.set()

    assert ended.wait(5)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_here_is_read_as_it_lies(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")

    with SourceFiles({"a": Path(tmp_path)}, [], tmp_path / "ranges", ROOM) as files:
        assert read(files, stored("a", "f", 2, 6)) == b"2345"


@settings(deadline=None)
@given(
    steps=st.lists(st.lists(tensors_of(45, 15), max_size=4), max_size=8), room=st.integers(1, 60)
)
def test_what_lies_ready_is_what_was_said_at_most(steps, room, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("files") / "ranges"
    held = Remote({"one": bytes(200), "two": bytes(200)})
    seen = [0]

    def fetch(file, start, stop, take):
        held.fetch(file, start, stop, take)
        seen.append(folder_bytes(scratch))

    locations = {"a": fetch, "b": fetch}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "N_REQUESTS", 4)
        with SourceFiles(locations, steps, scratch, room) as files:
            for step in steps:
                for tensor in step:
                    assert read(files, tensor) == bytes(tensor.header.n_bytes)
                files.step_done()
        most = scratch_bytes(locations, steps, room)

    assert max(seen) <= most
