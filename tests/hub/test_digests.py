import hashlib
import os
import time
from contextlib import contextmanager

import pytest

from lewis_hub.hub import digests
from lewis_hub.hub.digests import REMEMBERED_BYTES, digests_of, remember_digests

OLD = bytes(REMEMBERED_BYTES)
NEW = b"\1" + OLD[1:]


def sha256(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Told:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.stages, self.done = [], []

    @contextmanager
    def stage(self, *told):
        self.stages.append(told)
        yield self.done.append


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read to be hashed."""
    paths = []
    original = digests.sha256_of

    def recorded(path, advance=None):
        paths.append(path)
        return original(path, advance)

    monkeypatch.setattr(digests, "sha256_of", recorded)
    return paths


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A large file that nobody wrote to for a while."""
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)
    return path


def test_a_large_file_that_is_as_it_was_is_hashed_once(settled, hashed):
    assert digests_of([settled]) == digests_of([settled]) == [sha256(OLD)]
    assert hashed == [settled]


def test_a_changed_file_is_hashed_again_even_with_its_old_size_and_time(settled, hashed):
    digests_of([settled])
    seen = settled.stat()
    time.sleep(0.02)  # a tick of the clock that changes are stamped with
    settled.write_bytes(NEW)
    os.utime(settled, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    assert digests_of([settled]) == [sha256(NEW)]
    assert hashed == [settled, settled]


def test_a_file_in_another_place_is_another_file(settled, hashed, tmp_path):
    digests_of([settled])
    other = tmp_path / "other.safetensors"
    settled.replace(other)

    assert digests_of([other]) == [sha256(OLD)]
    assert hashed == [settled, other]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, hashed):
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)

    digests_of([path])
    digests_of([path])

    assert hashed == [path, path]


def test_a_small_file_is_hashed_each_time(settled, hashed):
    settled.write_bytes(b"small")

    assert digests_of([settled]) == digests_of([settled]) == [sha256(b"small")]
    assert hashed == [settled, settled]


def test_a_broken_note_is_not_believed(settled, hashed):
    digests_of([settled])
    (note,) = (digests.Path(digests.constants.HF_HOME) / "lewis-hub" / "digests").iterdir()
    note.write_text("nonsense")

    assert digests_of([settled]) == [sha256(OLD)]
    assert hashed == [settled, settled]


def test_many_bytes_are_read_with_progress_and_then_known(settled, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LONG_BYTES", 2 * REMEMBERED_BYTES)
    other, small = tmp_path / "other.safetensors", tmp_path / "config.json"
    other.write_bytes(NEW + b"more")
    small.write_bytes(b"{}")
    told = Told()

    remember_digests([settled, other, small], told)

    n_bytes = 2 * REMEMBERED_BYTES + 4
    assert told.stages == [("Reading local files", n_bytes, "bytes")]
    assert sum(told.done) == n_bytes
    assert max(told.done) <= 1 << 20
    hashed.clear()
    assert digests_of([settled, other]) == [sha256(OLD), sha256(NEW + b"more")]
    assert hashed == []
    remember_digests([settled, other], told)
    assert len(told.stages) == 1


def test_few_bytes_are_not_read_in_advance(settled, hashed):
    told = Told()

    remember_digests([settled], told)

    assert (told.stages, hashed) == ([], [])
