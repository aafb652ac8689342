from __future__ import annotations

import os
from collections import namedtuple

import pytest
from huggingface_hub import constants

from lewis_hub.errors import OutputError, SourceError
from lewis_hub.hub.fetch import CODE_FILES, bytes_to_download, fetch
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.source import cache_folder

SHARD = os.urandom(3 << 20)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": SHARD[::-1],
    "model.safetensors.index.json": b"{ }",
}
OTHERS = {
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"gguf",
    "modeling_odd.py": b"print('run me')",
    "original/model.safetensors": b"the same again",
    "README.md": b"---\nlicense: mit\n---\n",
}


@pytest.fixture
def source(api, push):
    push("tests/model", FILES | OTHERS)
    return resolve_model(api, "tests/model")


def files_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_a_model_is_fetched_without_pickles_code_and_second_copies(api, source):
    arrived = []

    folder = fetch(api, source, arrived.append)

    assert files_in(folder) == FILES
    assert sum(arrived) == sum(map(len, FILES.values()))
    assert bytes_to_download(source) == 0


def test_nothing_is_fetched_twice(api, source, hub, no_pauses):
    folder = fetch(api, source, lambda _: None)
    hub.fail("/resolve/", 500, times=1000)

    assert fetch(api, source, pytest.fail) == folder


def test_only_the_asked_files_are_fetched(api, source):
    assert bytes_to_download(source, ("*.jinja",)) == 14

    folder = fetch(api, source, lambda _: None, ("*.jinja",))

    assert list(files_in(folder)) == ["chat_template.jinja"]


def test_code_is_fetched_when_asked_and_pickles_even_then_not(api, source):
    folder = fetch(api, source, lambda _: None, (*CODE_FILES, "*.bin", "*.gguf"))

    assert list(files_in(folder)) == ["modeling_odd.py"]


def test_a_local_folder_is_used_where_it_is(tmp_path, api):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    local = resolve_model(api, str(tmp_path))

    assert fetch(api, local, pytest.fail) == tmp_path
    assert bytes_to_download(local) == 0


def test_a_server_error_during_the_download_is_retried(api, source, hub, no_pauses):
    hub.fail("/resolve/", 503, times=3)

    assert files_in(fetch(api, source, lambda _: None)) == FILES


def test_an_interrupted_file_goes_on_from_the_bytes_that_arrived(api, source):
    whole = bytes_to_download(source)
    received = []

    def interrupt(n_bytes):
        received.append(n_bytes)
        if sum(received) > 2 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(api, source, interrupt)
    parts = list(cache_folder("tests/model", "model").glob("blobs/*.partial"))
    left = bytes_to_download(source)
    arrived = []
    folder = fetch(api, source, arrived.append)

    assert parts
    assert 0 < left < whole
    assert sum(arrived) == left
    assert files_in(folder) == FILES
    assert not list(cache_folder("tests/model", "model").glob("blobs/*.partial"))


def test_a_connection_that_breaks_is_taken_up_where_it_broke(api, source, hub, no_pauses):
    hub.fail("/lfs/", "drop", after_bytes=1 << 20, times=3)
    arrived = []

    folder = fetch(api, source, arrived.append)

    assert files_in(folder) == FILES
    assert sum(arrived) == sum(map(len, FILES.values()))


def test_a_part_with_wrong_bytes_is_thrown_away(api, source):
    digest = source.file("model-00001-of-00002.safetensors").digest.removeprefix("sha256:")
    part = cache_folder("tests/model", "model") / "blobs" / f"{digest}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"not what it should be")

    assert files_in(fetch(api, source, lambda _: None)) == FILES


def test_a_disk_that_is_too_full_is_told_before_the_download(api, source, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 3 * 10**7, 3 * 10**7)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    with pytest.raises(OutputError) as raised:
        fetch(api, source, pytest.fail)

    assert str(raised.value) == (
        f"{constants.HF_HUB_CACHE}: the files of {source.pinned} need 0.07 GB, 0.03 GB are free.\n"
        "Free some space, or set HF_HUB_CACHE to a folder on a larger disk."
    )


def test_a_failing_download_names_the_hub_and_leaves_no_half_file(api, source, hub, no_pauses):
    hub.fail("/resolve/", 500, times=1000)

    with pytest.raises(SourceError) as raised:
        fetch(api, source, lambda _: None)

    assert str(raised.value).startswith(
        f"{source.pinned}: {api.endpoint} still fails with 500 after several attempts"
    )
