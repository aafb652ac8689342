"""Files of the cache whose bytes changed, by a disk or another program."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from huggingface_hub import constants

from lewis_hub.errors import SourceError
from lewis_hub.hub.changes import telling_changes
from lewis_hub.hub.fetch import fetch
from lewis_hub.hub.resolve import require_listed, resolve_model

SHARD = "model-00001-of-00002.safetensors"
FILES = {
    "config.json": b"{}",
    SHARD: os.urandom(3 << 20),
    "model-00002-of-00002.safetensors": os.urandom(1000),
    "model.safetensors.index.json": b"{ }",
}
each_kind = pytest.mark.parametrize("path", ["config.json", SHARD])  # of git, and a large one


@pytest.fixture
def source(api, push):
    push("tests/model", FILES)
    return resolve_model(api, "tests/model")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(path):
    """Let a file lose a bit; returns its bytes."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    return damaged


@each_kind
def test_a_cached_file_that_is_damaged_is_fetched_again(api, source, monkeypatch, path):
    blob = (fetch(api, source, lambda _: None) / path).resolve()

    damage(blob)
    assert files_in(fetch(api, source, lambda _: None)) == FILES

    damaged = damage(blob)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = resolve_model(api, "tests/model")
    with pytest.raises(SourceError) as error:
        fetch(api, found, lambda _: None)
    assert str(error.value) == (
        f"{found.pinned}: {found.snapshot / path} does not have the digest that it is named by.\n"
        "Run the same command again with a connection: it fetches the file again."
    )
    assert blob.read_bytes() == damaged


@each_kind
def test_a_damaged_file_stays_until_its_bytes_arrived(api, source, hub, no_pauses, path):
    """Another run reads the cache, too, and may replace the file at the same time."""
    folder = fetch(api, source, lambda _: None)
    damage((folder / path).resolve())
    hub.fail("/resolve/", 500, times=1000)

    with pytest.raises(SourceError):
        fetch(api, source, lambda _: None)
    assert (folder / path).exists()

    hub.faults.clear()
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(fetch, api, source, lambda _: None) for _ in range(8)]
    assert all(files_in(run.result()) == FILES for run in runs)


def test_a_file_elsewhere_that_the_cache_links_to_is_kept(api, source, tmp_path):
    folder = fetch(api, source, lambda _: None)
    mine = tmp_path / (folder / SHARD).readlink().name
    mine.write_bytes(b"mine")
    for again in (lambda: fetch(api, source, lambda _: None), lambda: require_listed(api, source)):
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(mine)
        with suppress(SourceError):
            again()
        assert mine.read_bytes() == b"mine"
        assert files_in(fetch(api, source, lambda _: None)) == FILES


def test_a_damaged_file_of_a_cache_without_links_is_fetched_again(api, source, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = fetch(api, source, lambda _: None)
    for path in ("config.json", SHARD):
        damage(folder / path)

    assert files_in(fetch(api, source, lambda _: None)) == FILES


def test_an_error_of_the_arithmetic_tells_which_file_changed(api, source):
    folder = fetch(api, source, lambda _: None)
    with pytest.raises(IndexError), telling_changes([source]):
        raise IndexError

    damage((folder / SHARD).resolve())
    with pytest.raises(SourceError) as error, telling_changes([source]):
        raise IndexError

    assert str(error.value) == (
        f"{source.pinned}: `{SHARD}` changed while it was read.\n"
        "Run the same command again: it fetches the file again."
    )
