import ctypes
import hashlib
import mmap
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from lewis_hub.checkpoint.writer import OutputTensor, ShardWriter, lay_out
from lewis_hub.errors import OutputError
from lewis_hub.files import require_room, sha256_of


def layout(*sizes):
    (shard,) = lay_out([OutputTensor(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)], 10**9)
    return shard


@pytest.fixture
def small_files_only():
    """Lets this process write no further than so many bytes into a file."""

    @contextmanager
    def limited(n_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.mark.parametrize("n_threads", [1, 4])
def test_ranges_completed_in_any_order_hash_to_the_files_sha256(tmp_path, n_threads):
    sizes = [3_000_000, 0, 1, 17, 0, 2_000_001, 5]
    shard = layout(*sizes)
    order = list(zip(shard.starts, sizes, strict=True))
    random.Random(0).shuffle(order)

    with ShardWriter(tmp_path, shard, stays_cached=True) as writer:

        def fill(place):
            start, size = place
            writer.write(start, memoryview(os.urandom(size)))
            writer.complete(start, start + size)

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(fill, order))
        digest = writer.finish()

    content = (tmp_path / "model.safetensors").read_bytes()
    assert content[: len(shard.header)] == shard.header
    assert len(content) == shard.n_bytes
    assert digest == hashlib.sha256(content).hexdigest() == sha256_of(writer.path)


def cached_share(path):
    """Of the pages of a file, the share that the system has in memory."""
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    n_pages = -(-len(held) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * n_pages)()
    address = np.frombuffer(held, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(held)), found) == 0
    return sum(page & 1 for page in found) / n_pages


def can_drop(path):
    path.write_bytes(b"0" * 10_000)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path) == 0


def test_what_is_not_read_next_leaves_the_cache_when_it_is_on_the_disk(tmp_path):
    if not can_drop(tmp_path / "control"):
        pytest.skip("the file system is in memory")
    shares = []
    for stays_cached in (True, False):
        shard = layout(3_000_000)
        with ShardWriter(tmp_path, shard, stays_cached=stays_cached) as writer:
            writer.write(shard.starts[0], memoryview(os.urandom(3_000_000)))
            writer.complete(shard.starts[0], shard.n_bytes)
            digest = writer.finish()
        shares.append(cached_share(writer.path))
        assert digest == sha256_of(writer.path)

    assert shares == [1, 0]


def test_the_file_has_its_full_size_before_any_tensor_is_written(tmp_path):
    with ShardWriter(tmp_path, layout(10**6), stays_cached=True) as writer:
        assert writer.path.stat().st_size == layout(10**6).n_bytes
        assert writer.path.stat().st_blocks * 512 >= 10**6


def test_a_full_disk_is_told_before_any_work(tmp_path):
    with pytest.raises(OutputError, match=r"the merged weights need \d+\.00 GB, .* GB are free"):
        require_room(tmp_path, 10**17, "the merged weights", "name another folder")
    with pytest.raises(OutputError, match="it cannot be written .*(too large|No space)"):
        ShardWriter(tmp_path, layout(2**62), stays_cached=True)


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path, small_files_only):
    with (
        ShardWriter(tmp_path, layout(10_000), stays_cached=True) as writer,
        small_files_only(100),
        pytest.raises(OutputError, match=r"\(File too large\)\.\nFree some space"),
    ):
        writer.write(200, memoryview(b"x"))


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        ShardWriter(tmp_path / "gone", layout(8), stays_cached=True)
