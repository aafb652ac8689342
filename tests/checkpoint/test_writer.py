import ctypes
import hashlib
import json
import mmap
import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.checkpoint.writer import OutputTensor, ShardWriter, index_document, lay_out
from lewis_hub.errors import OutputError
from lewis_hub.files import require_room, sha256_of

BYTES = OutputTensor("a", "F32", (3,))


def tensors(*sizes):
    return [OutputTensor(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 20))
def test_shards_are_those_of_huggingface_hub(sizes, limit):
    state = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )

    ours = lay_out(tensors(*sizes), limit)

    assert {s.name: [t.name for t in s.tensors] for s in ours} == theirs.filename_to_tensors


def test_a_tensor_above_the_limit_gets_its_own_shard_and_the_others_stay_together():
    shards = lay_out(tensors(2, 9, 2), 5)

    assert [[t.name for t in shard.tensors] for shard in shards] == [["t1"], ["t0", "t2"]]


def test_the_header_is_padded_and_tells_dtype_shape_and_offsets():
    (shard,) = lay_out([OutputTensor("half", "BF16", (3, 1)), BYTES], 100)

    (length,) = struct.unpack("<Q", shard.header[:8])
    entries = json.loads(shard.header[8:])

    assert length % 8 == 0
    assert len(shard.header) == 8 + length
    assert entries == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "half": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [12, 18]},
    }
    assert shard.starts == (8 + length, 20 + length)
    assert shard.n_bytes == 26 + length


def test_the_index_is_what_transformers_writes():
    shards = lay_out([OutputTensor("b", "BF16", (4,)), BYTES, OutputTensor("c", "F32", ())], 12)

    text = index_document(shards)

    assert (
        text
        == json.dumps(
            {
                "metadata": {"total_parameters": 8, "total_size": 24},
                "weight_map": {
                    "a": "model-00002-of-00003.safetensors",
                    "b": "model-00001-of-00003.safetensors",
                    "c": "model-00003-of-00003.safetensors",
                },
            },
            indent=2,
        )
        + "\n"
    )


@pytest.mark.parametrize("limit", [12, 10**9])
def test_a_single_shard_has_no_index(limit):
    shards = lay_out([BYTES], limit)

    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert index_document(shards) is None


def layout(*sizes):
    (shard,) = lay_out([OutputTensor(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)], 10**9)
    return shard


@pytest.fixture
def small_files_only():
    """Lets this process write no further than so many bytes into a file."""

    @contextmanager
    def limited(n_bytes):
        resource = pytest.importorskip("resource")
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


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_what_is_not_read_next_leaves_the_cache_when_it_is_on_the_disk(tmp_path):
    if not can_drop(tmp_path / "control"):
        pytest.skip("the file system is in memory")
    shares = []
    for stays_cached in (True, False):
        shard = layout(3_000_000)
        with ShardWriter(tmp_path, shard, stays_cached=stays_cached) as writer:
            writer.write(shard.starts[0], memoryview(os.urandom(3_000_000)))
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
