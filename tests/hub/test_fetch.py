from __future__ import annotations

import os
import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import XetFileData

from lewis_hub.errors import OutputError, SourceError
from lewis_hub.hub.cache import link
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.fetch import (
    CODE_FILES,
    bytes_to_download,
    fetch,
    read_pinned,
    read_small,
)
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.rows import commit_cache
from lewis_hub.hub.source import cache_folder, cache_root
from lewis_hub.localhub.store import git_file

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
    "adapter_config.json": b"{}",
    "original/model.safetensors": b"the same again",
    "README.md": b"---\nlicense: mit\n---\n",
}


@pytest.fixture
def source(api, push):
    push("tests/model", FILES | OTHERS)
    found = resolve_model(api, "tests/model")
    shutil.rmtree(cache_folder("tests/model", "model"))  # with the index: it tells the copies
    return found


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
    for thread in threading.enumerate():  # each download ends at its next piece
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=30)
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


def exchange(folder, path, content):
    """Let the cache have another file at a path, as after a Hub that listed another digest."""
    blob = folder.parents[1] / "blobs" / ("0" * 64)
    blob.write_bytes(content)
    (folder / path).unlink()
    (folder / path).symlink_to(os.path.relpath(blob, folder))


def test_what_another_hub_claimed_to_be_in_the_same_commit_is_not_used(api, source):
    folder = fetch(api, source, lambda _: None)
    shard = "model-00001-of-00002.safetensors"
    exchange(folder, shard, SHARD[::-1])
    exchange(folder, "config.json", b"[]")

    found = resolve_model(api, "tests/model")

    assert found == source
    assert not (folder / shard).exists()
    assert read_small(api, found, "config.json") == FILES["config.json"]
    assert read_range(api, found, shard, 0, 100) == SHARD[:100]
    assert files_in(fetch(api, found, lambda _: None)) == FILES


def test_what_the_commit_does_not_have_is_not_read(api, source):
    folder = fetch(api, source, lambda _: None)
    (folder / "added_tokens.json").symlink_to((folder / "config.json").readlink())
    (folder / "notes.txt").write_text("mine")

    assert resolve_model(api, "tests/model") == source
    assert files_in(folder) == FILES | {"notes.txt": b"mine"}


def test_a_cache_without_links_is_compared_by_content(api, source):
    folder = fetch(api, source, lambda _: None)
    for path in ("config.json", "model-00001-of-00002.safetensors"):
        content = (folder / path).read_bytes()
        (folder / path).unlink()
        (folder / path).write_bytes(content)
    assert resolve_model(api, "tests/model") == source
    assert files_in(folder) == FILES

    (folder / "config.json").write_bytes(b"[]")
    resolve_model(api, "tests/model")
    assert not (folder / "config.json").exists()


def test_a_small_file_has_the_digest_that_was_listed(api, source, hub):
    files = hub.store.find("models", "tests/model").commits[source.commit_sha].files
    files["config.json"] = files["tokenizer.json"]

    with pytest.raises(SourceError) as error:
        read_small(api, source, "config.json")
    assert str(error.value) == (
        f"{source.pinned}: `config.json` does not have the digest that {hub.url} lists.\n"
        "Try again; if the error stays, a proxy or the repo itself is broken."
    )


def test_a_mirror_that_names_a_file_by_the_digest_of_another_one_leaves_nothing(api, source, hub):
    shard, other = "model-00001-of-00002.safetensors", SHARD[::-2]
    files = hub.store.find("models", "tests/model").commits[source.commit_sha].files
    true = dict(files)
    files["config.json"] = git_file(other, hub.store.blobs.add(other))
    lied_to = resolve_model(api, "tests/model")
    files["config.json"] = replace(files["config.json"], oid=true[shard].sha256)  # its ETag

    assert read_small(api, lied_to, "config.json") == other
    fetch(api, lied_to, lambda _: None, ("config.json",))

    files.update(true)
    found = resolve_model(api, "tests/model")
    assert found == source
    assert files_in(fetch(api, found, lambda _: None)) == FILES


def test_a_mirror_may_have_etags_of_its_own(api, source, hub):
    files = hub.store.find("models", "tests/model").commits[source.commit_sha].files
    for path in FILES:
        if not files[path].lfs:
            files[path] = replace(files[path], oid="f" * 32)
    found = source

    assert read_small(api, found, "config.json") == FILES["config.json"]
    assert files_in(fetch(api, found, lambda _: None)) == FILES
    assert bytes_to_download(found) == 0


def test_a_blob_that_is_not_what_its_name_says_is_fetched_again(api, source):
    folder = fetch(api, source, lambda _: None)
    for path in ("config.json", "model-00001-of-00002.safetensors"):
        (folder / path).resolve().write_bytes(b"[]")
        if path != "config.json":
            (folder / path).unlink()

    assert read_small(api, source, "config.json") == FILES["config.json"]
    assert files_in(fetch(api, source, lambda _: None)) == FILES


def test_a_cache_without_links_gets_copies(api, source, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = fetch(api, source, lambda _: None)
    assert files_in(folder) == FILES
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert resolve_model(api, "tests/model") == source


@pytest.mark.parametrize("etag", ["../../../outside", ""])
def test_an_etag_is_no_path(api, source, hub, xet, no_pauses, etag):
    shard = "model-00001-of-00002.safetensors"
    files = hub.store.find("models", "tests/model").commits[source.commit_sha].files
    files[shard] = replace(files[shard], sha256=etag)
    xet[shard] = SHARD

    with pytest.raises(SourceError) as error:
        fetch(api, source, lambda _: None, (shard,))
    assert f"(an answer has the X-Linked-Etag {etag!r})" in str(error.value)
    assert not (cache_root().parent / "outside").exists()
    assert not (source.snapshot / shard).is_symlink()


def test_an_answer_about_another_commit_is_none(api, source, hub):
    commits = hub.store.find("models", "tests/model").commits
    commits[source.commit_sha] = replace(commits[source.commit_sha], sha="e" * 40)

    with pytest.raises(SourceError, match="a file of another commit came, 'eeee"):
        read_small(api, source, "config.json")


def test_a_local_file_that_changes_after_its_digest_was_read_is_told(api, tmp_path):
    for path, content in FILES.items():
        (tmp_path / path).write_bytes(content)
    local = resolve_model(api, str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"[]")

    with pytest.raises(SourceError, match="config.json changed after its digest was read"):
        read_small(api, local, "config.json")


@pytest.fixture
def xet(hub, monkeypatch):
    """Serves large files from Xet: path -> content. Xet checks a content by a hash of its own."""
    served, hashes = {}, {}
    metadata = file_download.get_hf_file_metadata

    def in_xet(url, **options):
        found = metadata(url=url, **options)
        path = url.rpartition("/")[2]
        if path not in served:
            return found
        own = sha256(b"xet" + served[path]).hexdigest()
        hashes[own] = served[path]
        return replace(found, xet_file_data=XetFileData(own, hub.url))

    def xet_get(*, incomplete_path, xet_file_data, **_):
        incomplete_path.write_bytes(hashes[xet_file_data.file_hash])

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(file_download, "is_xet_available", lambda: True)
    monkeypatch.setattr(file_download, "get_hf_file_metadata", in_xet)
    monkeypatch.setattr(file_download, "xet_get", xet_get)
    return served


def test_a_file_from_xet_has_the_digest_that_was_listed(api, source, hub, xet):
    shard = "model-00001-of-00002.safetensors"
    xet[shard] = SHARD[::-1]
    hub.fail("/lfs/", 404, times=1000)

    with pytest.raises(SourceError):
        fetch(api, source, lambda _: None, (shard,))
    assert not (source.snapshot / shard).exists()

    hub.faults.clear()
    assert (fetch(api, source, lambda _: None, (shard,)) / shard).read_bytes() == SHARD


def test_a_damaged_file_in_the_store_of_all_repos_is_not_used(api, push, xet, monkeypatch):
    """huggingface_hub compares only its size before it links to it again."""
    shard = "model-00001-of-00002.safetensors"
    xet[shard] = SHARD
    monkeypatch.setattr("lewis_hub.hub.fetch.N_DOWNLOADS", 1)  # as above
    push("tests/first", FILES)
    push("tests/second", FILES)
    stored = (fetch(api, resolve_model(api, "tests/first"), lambda _: None) / shard).resolve()
    assert stored.is_relative_to(cache_root() / "blobs")
    stored.chmod(0o644)
    stored.write_bytes(SHARD[::-1])

    for name in ("tests/first", "tests/second"):
        for _ in range(2):
            folder = fetch(api, resolve_model(api, name), lambda _: None)
            assert files_in(folder) == FILES


def test_files_from_xet_are_read_from_the_cache(api, push, xet, monkeypatch):
    tokenizer = b"\0" * 3000  # a large file
    push("tests/large", FILES | {"tokenizer.model": tokenizer})
    xet |= {"model-00001-of-00002.safetensors": SHARD, "tokenizer.model": tokenizer}
    source = resolve_model(api, "tests/large")
    # two first files at once: huggingface_hub may leave one out of the store that repos share
    monkeypatch.setattr("lewis_hub.hub.fetch.N_DOWNLOADS", 1)
    folder = fetch(api, source, lambda _: None)
    shard = folder / "model-00001-of-00002.safetensors"
    assert os.path.relpath(shard.resolve(), cache_root()).startswith("blobs")  # of all repos

    again = resolve_model(api, "tests/large")
    assert again == source
    assert bytes_to_download(again) == 0
    assert read_range(api, again, shard.name, 1, 5) == SHARD[1:5]
    assert read_pinned(again, again.file("tokenizer.model")) == tokenizer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = {file.path: file.digest for file in resolve_model(api, "tests/large").files}
    assert offline == {file.path: file.digest for file in source.files if file.path in offline}
    assert offline.keys() == FILES.keys() | {"tokenizer.model"}


def test_a_file_is_the_one_of_which_a_part_was_read_before(api, source, hub):
    shard = "model-00001-of-00002.safetensors"
    stored = hub.store.blobs.path(sha256(SHARD).hexdigest())
    stored.write_bytes(SHARD[::-1])
    assert read_range(api, source, shard, 8, 16) == SHARD[::-1][8:16]
    stored.write_bytes(SHARD)

    with pytest.raises(SourceError) as error:
        fetch(api, source, lambda _: None, (shard,))
    assert str(error.value) == (
        f"{source.pinned}: `{shard}` is another file than {hub.url} lists.\n"
        "Run the same command again; it resolves the files again."
    )
    assert read_range(api, source, shard, 8, 16) == SHARD[8:16]
    assert (fetch(api, source, lambda _: None, (shard,)) / shard).read_bytes() == SHARD


def test_rows_of_two_hubs_have_caches_of_their_own(monkeypatch):
    ours = commit_cache("0" * 40)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    assert commit_cache("0" * 40) != ours


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tekken.json"])
def test_a_model_with_a_small_file_that_is_large_is_not_loaded(tmp_path, api, push, name):
    """transformers reads such files whole, where a model is scored or calibrated."""
    (tmp_path / "model.safetensors").write_bytes(SHARD)
    with (tmp_path / name).open("wb") as file:
        file.truncate(100_000_001)
    push("tests/large", {"model.safetensors": SHARD, name: b"{}"})
    remote = resolve_model(api, "tests/large")
    files = [replace(file, size_bytes=100_000_001) for file in remote.files]

    for large in (resolve_model(api, str(tmp_path)), replace(remote, files=tuple(files))):
        with pytest.raises(SourceError) as caught:
            fetch(api, large, lambda _: None)
        assert str(caught.value) == (
            f"{large.pinned}: `{name}` has more than 100,000,000 bytes, so it is not read.\n"
            "Use an intact copy of the repo or folder."
        )


def test_a_model_with_a_small_file_of_very_many_values_is_not_loaded(tmp_path, api):
    """transformers reads them without a limit, and copies them: 15 MB took over 1 GB."""
    (tmp_path / "model.safetensors").write_bytes(SHARD)
    (tmp_path / "generation_config.json").write_bytes(b'{"a": [' + b"[]," * 2_000_000 + b"1]}")
    source = resolve_model(api, str(tmp_path))

    with pytest.raises(SourceError) as caught:
        fetch(api, source, lambda _: None)

    assert str(caught.value) == (
        f"{tmp_path}: `generation_config.json` has 4,000,003 values, the limit is 4,000,000.\n"
        "Use an intact copy of the repo or folder."
    )


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_of_the_cache_never_goes_missing_while_it_is_replaced(
    api, source, monkeypatch, has_links
):
    """Another run that shares the cache may read it at any moment, and ended in a traceback."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not has_links)
    path = fetch(api, source, lambda _: None) / "config.json"
    file = next(file for file in source.files if file.path == "config.json")
    path.unlink()
    path.write_bytes(b"another file")
    seen = []

    def watched(call):
        def watch(*args, **options):
            seen.append(path.read_bytes())
            return call(*args, **options)

        return watch

    for name in ("symlink", "replace", "rename"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    assert link(HubRepo.of(api, source), file) == path

    assert seen == [b"another file"] * len(seen) != []
    assert path.read_bytes() == FILES["config.json"]
    assert [one.name for one in path.parent.iterdir() if one.name.startswith(".")] == []
