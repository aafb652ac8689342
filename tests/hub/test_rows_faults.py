"""Rows of a Hub that answers otherwise than it listed, and cards of datasets beyond the limits."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFolder

from lewis_hub.cli.main import disk_failure
from lewis_hub.documents import MAX_JSON_BYTES, MAX_JSON_VALUES
from lewis_hub.errors import SourceError
from lewis_hub.evaluate.benchmarks import at_commits, prepared
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.hub import fetch, rows
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.hub.rows import describe_dataset, load_rows, only_tables
from lewis_hub.hub.source import cache_root
from lewis_hub.workflow.task_data import scored_sources

ROWS, OTHERS = (b'{"text": "%s"}\n' % text for text in (b"yes", b"no"))
CARD = b"---\nconfigs:\n- {config_name: default, data_files: other.jsonl}\n---\n"
INFOS = {"me--rows": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}


def files_of(hub, sha):
    """The files that a Hub answers with from now on; what was resolved before is as it was."""
    return hub.store.find("datasets", "me/rows").commits[sha].files


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "dataset_infos.json"])
def test_a_card_that_was_not_listed_says_nothing(hub, api, push, name):
    sha = push("me/rows", {"train.jsonl": ROWS, "other.jsonl": OTHERS}, "dataset")
    card = {"README.md": CARD, "dataset_infos.json": b"["}.get(name, CARD.replace(b"---\n", b""))
    later = push("me/rows", {name: card}, "dataset")
    hidden = files_of(hub, later)[name]
    source = resolve_dataset(api, "me/rows", sha)
    files_of(hub, sha)[name] = hidden

    assert describe_dataset(api, source, None, "train").splits == ("train",)
    assert load_rows(api, source, None, "train").rows([0]) == [{"text": "yes"}]
    assert not (source.snapshot / name).exists()


def test_the_card_of_another_commit_says_nothing(hub, api, push):
    """A Hub may say that the commit that is asked for is another one."""
    sha = push("me/rows", {"train.jsonl": ROWS}, "dataset")
    source = resolve_dataset(api, "me/rows")
    commits = hub.store.find("datasets", "me/rows").commits
    other = commits[push("me/rows", {"README.md": CARD, "other.jsonl": OTHERS}, "dataset")]
    files = {path: file for path, file in other.files.items() if path != "README.md"}
    commits[sha] = replace(other, files=files)

    assert describe_dataset(api, source, None, "train").splits == ("train",)
    with pytest.raises(SourceError, match=f"`{other.sha}/train.jsonl` is another file than"):
        load_rows(api, source, None, "train")
    assert not list(cache_root().rglob("snapshots/*/README.md"))


@pytest.mark.parametrize("name", ["train-1.jsonl", "more/train.jsonl", "data/train.jsonl"])
def test_a_file_that_the_hub_does_not_list_again_is_missed(hub, api, push, name):
    sha = push("me/rows", {"train-0.jsonl": ROWS, name: OTHERS}, "dataset")
    source = resolve_dataset(api, "me/rows")
    kept = files_of(hub, sha).pop(name)

    with pytest.raises(SourceError, match=f"it has no (file `{name}`|readable data files)"):
        load_rows(api, source, None, "train")

    files_of(hub, sha)[name] = kept
    rows = load_rows(api, source, None, "train")
    assert {row["text"] for row in rows.rows(range(len(rows)))} <= {"yes", "no"}


def test_the_files_of_a_dataset_are_listed_as_the_hub_lists_them(hub, api, push):
    large = {"deep/a/train.parquet": bytes(100), "deep/b.txt": b"b", "c d/é.txt": b"c", "e": b""}
    source = resolve_dataset(api, "me/rows", push("me/rows", large, "dataset"))

    def listed(folder, recursive):
        found = api.list_repo_tree(
            "me/rows", folder, recursive=recursive, revision=source.commit_sha, repo_type="dataset"
        )
        return {one.path: described(one) for one in found}

    def described(one):
        if isinstance(one, RepoFolder):
            return "a folder"
        return one.size, one.lfs.sha256 if one.lfs else one.blob_id

    for folder in ("", "deep", "deep/a", "c d"):
        for recursive in (False, True):
            expected = listed(folder, recursive)
            with only_tables(source):
                assert listed(folder, recursive) == expected
    with only_tables(source), pytest.raises(EntryNotFoundError):
        listed("none", recursive=True)


def test_a_file_of_rows_has_no_more_bytes_than_were_listed(hub, api, push, no_pauses):
    sha = push("me/rows", {"train.jsonl": ROWS}, "dataset")
    source = resolve_dataset(api, "me/rows")
    longer = ROWS * 100_000
    true = files_of(hub, sha)["train.jsonl"]
    stored = hub.store.blobs.add(longer)
    files_of(hub, sha)["train.jsonl"] = replace(true, sha256=stored, size_bytes=len(longer))

    with pytest.raises(SourceError) as raised:
        load_rows(api, source, None, "train")
    assert "(bytes 0-15/16 were requested, 'bytes 0-1599999/1600000' came)" in str(raised.value)
    assert all(path.stat().st_size < 1000 for path in cache_root().rglob("train.jsonl*"))


def test_huggingface_hub_downloads_no_more_bytes_than_were_listed(
    hub, api, push, no_pauses, monkeypatch
):
    """As it does where a file comes from Xet by one answer, and not by the next."""
    weights = bytes(1000)
    sha = push("me/rows", {"train.parquet": weights}, "dataset")
    source = resolve_dataset(api, "me/rows")
    hub.store.blobs.path(files_of(hub, sha)["train.parquet"].sha256).write_bytes(weights * 100_000)
    monkeypatch.setattr(fetch, "_is_stored_in_xet", lambda *_: True)

    with pytest.raises(SourceError, match=r"a file has more than 1,000 bytes"):
        fetch.fetch_files(api, source, source.files)
    assert sum(path.stat().st_size for path in cache_root().rglob("*.incomplete")) <= 1000


def test_the_infos_of_a_dataset_are_within_the_limits(tmp_path, api):
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    infos = tmp_path / "dataset_infos.json"
    infos.write_text(json.dumps(INFOS))
    source = resolve_dataset(api, str(tmp_path))
    assert describe_dataset(api, source, None, "train").columns == ("text",)

    for text, problem in {
        "[" * 101 + "]" * 101: "its values are in each other more than 100 deep",
        "[" + "0," * MAX_JSON_VALUES + "0]": (
            f"it has {MAX_JSON_VALUES + 1:,} values, the limit is {MAX_JSON_VALUES:,}"
        ),
        " " * (MAX_JSON_BYTES + 1): f"it has more than {MAX_JSON_BYTES:,} bytes",
    }.items():
        infos.write_text(text)
        with pytest.raises(SourceError) as raised:
            describe_dataset(api, resolve_dataset(api, str(tmp_path)), None, "train")
        assert f": `dataset_infos.json` cannot be read: {problem}.\n" in str(raised.value)


def test_a_card_of_a_folder_is_not_read_whole_if_it_is_large(tmp_path, api):
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    with (tmp_path / "README.md").open("wb") as card:
        card.write(b"---\nlicense: mit\n---\n")
        card.truncate(MAX_JSON_BYTES + 1)

    with pytest.raises(SourceError) as raised:
        describe_dataset(api, resolve_dataset(api, str(tmp_path)), None, "train")
    assert str(raised.value).endswith(
        f": `README.md` cannot be read: it has more than {MAX_JSON_BYTES:,} bytes.\n"
        "Repair its card, or use another dataset."
    )


@pytest.mark.parametrize("place", ["hub", "offline", "folder"])
@pytest.mark.parametrize(
    ("old", "new"), [(b"yes", b"yer"), (b'"num_examples": 1', b'"num_examples": 0')]
)
def test_rows_that_are_damaged_in_the_cache_are_made_again(
    tmp_path, api, push, monkeypatch, place, old, new
):
    """A disk may lose bits; `datasets` compares no digests."""
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    push("me/cache-rows", {"train.jsonl": ROWS}, "dataset")
    source = resolve_dataset(api, str(tmp_path) if place == "folder" else "me/cache-rows")
    table = load_rows(api, source, None, "train").table
    table.map(lambda _: {"n": 1}, remove_columns="text")  # which writes a file beside the rows
    folder = Path(table.cache_files[0]["filename"]).parent
    (harmed,) = (path for path in folder.iterdir() if old in path.read_bytes())
    harmed.write_bytes(harmed.read_bytes().replace(old, new))

    with monkeypatch.context() as patch:
        for config in ("huggingface_hub.constants", "datasets.config"):
            patch.setattr(f"{config}.HF_HUB_OFFLINE", place == "offline")
        with pytest.raises(SourceError) as raised:
            load_rows(api, source, None, "train")
    assert str(raised.value) == (
        f"{folder}: these rows in the cache of `datasets` are damaged.\n"
        "Run the same command again: it makes them again."
    )
    assert load_rows(api, source, None, "train").rows([0]) == [{"text": "yes"}]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_file(tmp_path, api, monkeypatch, number):
    """The command line has a message for each."""
    (tmp_path / "train.jsonl").write_bytes(ROWS)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")
    assert disk_failure(raised.value)


def text_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_rows_of_a_file_that_grew_since_it_was_pinned_are_refused(tmp_path, api):
    """They would be in a merge whose lock names the file as it was."""
    path = tmp_path / "texts.jsonl"
    path.write_text(text_lines("a", "b"))
    source = resolve_dataset(api, str(path))
    with path.open("a") as opened:
        opened.write(text_lines("c"))

    with pytest.raises(SourceError) as caught:
        load_rows(api, source, None, "train")

    assert str(caught.value) == (
        f"{path}: `texts.jsonl` changed while it was read.\nRestore it, then run again."
    )


@pytest.mark.parametrize("kind", ["file", "folder", "folder with a card"])
def test_rows_of_another_file_with_the_same_times_are_read(tmp_path, api, kind):
    """`datasets` knows a file by its time, which tar, zip, cp -p and rsync keep.

    In a folder whose card names the file it did not look at the file at all.
    """
    path = tmp_path / "rows" / "train.jsonl"
    path.parent.mkdir()
    if kind == "folder with a card":
        card = "configs:\n- {config_name: default, data_files: train.jsonl}\n"
        (path.parent / "README.md").write_text(f"---\n{card}---\n")
    for text in ("a", "b"):
        path.write_text(text_lines(text))
        os.utime(path, (1, 1))
        asked = resolve_dataset(api, str(path if kind == "file" else path.parent))
        assert load_rows(api, asked, None, "train").rows([0]) == [{"text": text}]
        with at_commits({}):
            table = datasets.load_dataset("json", data_files=str(path), split="train")
        assert table.to_list() == [{"text": text}]


def test_files_that_are_left_out_stop_no_rows(tmp_path, api):
    (tmp_path / "train.jsonl").write_text(text_lines("a"))
    (tmp_path / "notes.txt").write_text("of another kind")
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")

    found = load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")

    assert found.rows([0]) == [{"text": "a"}]


def tarred(name, content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("name", ["train.jsonl.tar.gz", "train.jsonl"])
def test_no_archive_is_unpacked_to_the_disk(tmp_path, api, push, name):
    """It took any room, and by its path it was never unpacked again: rows of an older one."""
    rows_of_one = text_lines("a").encode()
    is_archive = name.endswith("tar.gz")
    content = tarred("a.jsonl", rows_of_one) if is_archive else gzip.compress(rows_of_one)
    (tmp_path / name).write_bytes(content)
    push("me/packed", {name: content}, "dataset")

    for asked in (str(tmp_path), "me/packed"):
        with pytest.raises(SourceError) as caught:
            load_rows(api, resolve_dataset(api, asked), None, "train")
        assert (
            "is an archive, or is compressed though its name does not say so; .jsonl, .jsonl.gz, "
            ".csv and .parquet are read)." in str(caught.value)
        )
    packed = tmp_path / "packed"
    packed.mkdir()
    for text in ("a", "b"):
        (packed / "train.jsonl.gz").write_bytes(gzip.compress(text_lines(text).encode()))
        found = load_rows(api, resolve_dataset(api, str(packed)), None, "train")
        assert found.rows([0]) == [{"text": text}]


def test_no_rows_are_kept_of_a_file_that_changed_and_was_restored_while_it_was_read(
    tmp_path, api, monkeypatch
):
    path = tmp_path / "texts.jsonl"
    path.write_text(text_lines("a"))
    limited_memory = rows.limited_memory

    @contextmanager
    def changed(n_bytes):
        path.write_text(text_lines("b"))
        with limited_memory(n_bytes):
            yield
        path.write_text(text_lines("a"))

    monkeypatch.setattr(rows, "limited_memory", changed)
    with at_commits({}), pytest.raises(SourceError) as caught:
        datasets.load_dataset("json", data_files=str(path), split="train")
    monkeypatch.setattr(rows, "limited_memory", limited_memory)

    assert str(caught.value) == (
        f"{tmp_path}: `texts.jsonl` changed while it was read.\nRestore it, then run again."
    )
    with at_commits({}):
        table = datasets.load_dataset("json", data_files=str(path), split="train")
    assert table.to_list() == [{"text": "a"}]


def test_what_functions_compute_of_rows_is_computed_anew(tmp_path, monkeypatch):
    """`datasets` names it by the name of the function: an edited one gave the old rows."""
    (tmp_path / "own_rows.py").write_text("def word(row):\n    return {'word': WORD}\n")
    monkeypatch.syspath_prepend(tmp_path)
    own: Any = import_module("own_rows")
    path = tmp_path / "texts.jsonl"
    path.write_text(text_lines("x"))
    found = []
    for word in ("a", "b"):
        own.WORD = word
        with prepared(TaskSelection(("gsm8k",)), {}):
            table: Any = datasets.load_dataset("json", data_files=str(path), split="train")
            found.append(table.map(own.word)[0]["word"])

    assert found == ["a", "b"]
    assert datasets.is_caching_enabled()


def test_a_scored_dataset_that_cannot_be_found_is_not_read_from_a_cache(tmp_path, api):
    """The cache of `datasets` may have rows of another commit, or of another Hub."""
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: me/none\ntest_split: train\n")

    with pytest.raises(SourceError, match="me/none"):
        scored_sources(api, TaskSelection(("own",), tmp_path))
