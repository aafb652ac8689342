import hashlib
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lewis_hub.checkpoint.layout import OutputTensor, lay_out
from lewis_hub.checkpoint.writer import ShardWriter
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

    with ShardWriter(tmp_path, shard) as writer:

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


def test_the_file_has_its_full_size_before_any_tensor_is_written(tmp_path):
    with ShardWriter(tmp_path, layout(10**6)) as writer:
        assert writer.path.stat().st_size == layout(10**6).n_bytes
        assert writer.path.stat().st_blocks * 512 >= 10**6


def test_a_full_disk_is_told_before_any_work(tmp_path):
    with pytest.raises(OutputError, match=r"the merged weights need \d+\.00 GB, .* GB are free"):
        require_room(tmp_path, 10**17, "the merged weights", "name another folder")
    with pytest.raises(OutputError, match="it cannot be written .*(too large|No space)"):
        ShardWriter(tmp_path, layout(2**62))


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path, small_files_only):
    with (
        ShardWriter(tmp_path, layout(10_000)) as writer,
        small_files_only(100),
        pytest.raises(OutputError, match=r"\(File too large\)\.\nFree some space"),
    ):
        writer.write(200, memoryview(b"x"))


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        ShardWriter(tmp_path / "gone", layout(8))
