from __future__ import annotations

import itertools
import json
import os
import pickle
from dataclasses import replace

import pytest
from huggingface_hub import HfApi, constants

from lewis_hub.errors import SourceError
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.fetch import fetch, read_small, weight_files
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.resolve import resolve_dataset, resolve_model
from lewis_hub.hub.source import (
    cache_folder,
    cache_root,
    cached_sha,
    listed_file,
    remember_revision,
)
from lewis_hub.hub.target import read_target

WEIGHTS = bytes(range(256)) * 8
MODEL = {"config.json": b"{}", "model.safetensors": WEIGHTS}


def refusal(api, name, revision=None, resolve=resolve_model) -> str:
    with pytest.raises(SourceError) as raised:
        resolve(api, str(name), revision)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    return str(raised.value)


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


# -- folders


def test_a_folder_is_pinned_to_its_content_wherever_it_lies(tmp_path, api):
    here, there = write(tmp_path / "here", MODEL), write(tmp_path / "there", MODEL)

    source = resolve_model(api, str(here))

    assert source.commit_sha == resolve_model(api, str(there)).commit_sha
    assert source.commit_sha.startswith("sha256:")
    assert [file.path for file in source.files] == ["config.json", "model.safetensors"]
    assert source.pinned == str(here)
    assert source.size_bytes(("*.safetensors",)) == len(WEIGHTS)


def test_a_folders_pin_changes_with_any_byte_and_any_name(tmp_path, api):
    folder = write(tmp_path / "model", MODEL)
    first = resolve_model(api, str(folder)).commit_sha

    (folder / "config.json").write_bytes(b"[]")
    second = resolve_model(api, str(folder)).commit_sha
    (folder / "config.json").rename(folder / "other.json")

    assert len({first, second, resolve_model(api, str(folder)).commit_sha}) == 3


def test_hidden_files_and_caches_are_no_part_of_a_folder(tmp_path, api):
    folder = write(tmp_path / "model", MODEL)
    pinned = resolve_model(api, str(folder)).commit_sha

    write(folder, {".cache/huggingface/x": b"x", ".gitattributes": b"x", ".git/HEAD": b"x"})

    assert resolve_model(api, str(folder)).commit_sha == pinned


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "the folder is empty.\nCheck the path."),
        (
            {"config.json": b"{}"},
            "this folder has no .safetensors file.\nA model needs model.safetensors, or shards "
            "and their index, beside config.json.",
        ),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "this folder has pickled weights only, and reading those can run code.\n"
            "Only safetensors are read. Convert it: load it in transformers, then "
            "`save_pretrained(FOLDER)`, and use FOLDER; or ask its author for safetensors.\n"
            "With `--allow-pickle` torch reads it without running its code, but a flaw in "
            "that reader would let its author run code here: allow it for authors that you trust.",
        ),
        (
            {"model-q4.gguf": b"x"},
            "this folder has GGUF weights only.\n"
            "Use the safetensors model that they were quantised from.",
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"x"},
            "this is a LoRA adapter without adapter_model.safetensors.\n"
            "Save it again with peft: `save_pretrained(FOLDER)` writes both files.",
        ),
        (
            {"adapter_model.safetensors": b"x"},
            "this is a LoRA adapter without adapter_config.json.\n"
            "Save it again with peft: `save_pretrained(FOLDER)` writes both files.",
        ),
        (
            {"nested/model.safetensors": b"x"},
            "this folder has no .safetensors file.\nA model needs model.safetensors, or shards "
            "and their index, beside config.json.",
        ),
    ],
)
def test_folders_that_are_no_models_are_refused(tmp_path, api, files, expected):
    folder = tmp_path / "model"
    folder.mkdir()

    assert refusal(api, write(folder, files)) == f"{folder}: {expected}"


def test_an_adapter_is_told_by_its_files_and_a_model_beside_one_is_a_model(tmp_path, api):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    adapter = resolve_model(api, str(write(tmp_path / "adapter", files)))
    both = resolve_model(api, str(write(tmp_path / "both", files | MODEL)))

    assert (adapter.is_adapter, both.is_adapter) == (True, False)
    assert weight_files(adapter) == ("adapter_model.safetensors",)
    assert weight_files(both) == ("model.safetensors",)


def test_shards_beside_a_whole_file_are_not_its_weights(tmp_path, api):
    stale = {"model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json": b"{}"}

    found = resolve_model(api, str(write(tmp_path / "model", MODEL | stale)))

    assert weight_files(found) == ("model.safetensors",)


def index(*shards):
    return json.dumps({"weight_map": {f"{shard}.w": shard for shard in shards}}).encode()


SHARDS = {"model-00001-of-00001.safetensors": b"x", "mtp.safetensors": b"y"}


def test_the_files_that_an_index_names_are_the_weights(tmp_path, api):
    first, other = SHARDS
    files = SHARDS | {
        "consolidated.safetensors": b"z",
        "model.safetensors.index.json": index(first),
    }
    stray = resolve_model(api, str(write(tmp_path / "stray", files)))
    files["model.safetensors.index.json"] = index(first, other)
    named = resolve_model(api, str(write(tmp_path / "named", files)))

    assert weight_files(stray) == (first,)
    assert weight_files(named) == (first, other)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"weight_map": [1]}', None])
def test_without_an_index_that_can_be_read_the_names_tell_the_weights(broken, tmp_path, api):
    files = SHARDS if broken is None else SHARDS | {"model.safetensors.index.json": broken}

    found = resolve_model(api, str(write(tmp_path / "model", files)))

    assert weight_files(found) == ("model-00001-of-00001.safetensors",)


def test_a_name_that_is_not_utf8_is_one_message(tmp_path, api):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / os.fsdecode(b"notes\xff.txt")).write_text("")

    with pytest.raises(SourceError) as caught:
        resolve_model(api, str(tmp_path))

    problem = r"the name of a file in it is not UTF-8: 'notes\udcff.txt'"
    assert str(caught.value) == f"{tmp_path}: {problem}.\nRename or delete the file."


def test_a_missing_folder_and_a_file_are_refused(tmp_path, api):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")

    assert refusal(api, path) == (
        f"{path}: this is a file, not a folder.\nName the folder it is in."
    )


@pytest.mark.parametrize(
    "name", ["./nowhere", "models/mine/best", "data/missing.jsonl", "rows.csv"]
)
def test_what_can_only_be_a_path_is_looked_for_here_and_nowhere_else(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    nowhere = HfApi(endpoint="http://127.0.0.1:1")
    expected = (
        f"{name}: no such file or folder: looked for {tmp_path / name}.\n"
        "Check the path; a repo is written owner/name."
    )

    assert refusal(nowhere, name) == expected
    assert refusal(nowhere, name, resolve=resolve_dataset) == expected


def test_a_repo_whose_name_ends_like_a_file_is_found_by_its_revision(api, push):
    sha = push("tests/rows.json", {"train.jsonl": b"{}\n"}, repo_type="dataset")

    assert resolve_dataset(api, "tests/rows.json", "main").commit_sha == sha


@pytest.mark.parametrize("name", ["owner/na me", "owner/a--b", "owner/", "naïve/model"])
def test_a_bad_name_is_refused_before_any_network(name):
    nowhere = HfApi(endpoint="http://127.0.0.1:1")

    assert refusal(nowhere, name) == (
        f"{name}: this is neither an existing folder nor the name of a repo.\n"
        "Write owner/name (letters, digits, `-`, `_`, `.`), or the path of a folder."
    )


# -- repos


def test_all_files_of_a_large_repo_are_listed(api, push, monkeypatch):
    """Where it describes a repo with more than 1,000 files, huggingface.co may leave out some."""
    files = {f"{folder}/{n}.jsonl": b"%d" % n for folder in ("a", "b/c") for n in range(600)}
    push("me/rows", files | {"weights.parquet": b"1"}, "dataset")
    whole = api.repo_info("me/rows", repo_type="dataset", files_metadata=True)
    described = replace(
        resolve_dataset(api, "me/rows"), files=tuple(map(listed_file, whole.siblings))
    )

    whole.siblings = whole.siblings[:1000]
    monkeypatch.setattr(api, "repo_info", lambda *_, **__: whole)
    assert len(described.files) == 1202  # with .gitattributes
    assert resolve_dataset(api, "me/rows") == described


def test_a_list_of_files_that_does_not_end_is_not_kept(api, push, monkeypatch):
    """A Hub that listed more and more of them, page by page, took gigabytes and minutes."""
    push("me/model", {"model.safetensors": b"1"})
    whole = api.repo_info("me/model", files_metadata=True)
    (one,) = api.get_paths_info("me/model", ["model.safetensors"])
    whole.siblings = [*whole.siblings] * 500
    monkeypatch.setattr(api, "repo_info", lambda *_, **__: whole)
    monkeypatch.setattr(api, "list_repo_tree", lambda *_, **__: itertools.repeat(one))
    monkeypatch.setattr("lewis_hub.hub.resolve.MAX_FILES", 2000)

    assert "me/model: it has more than 2,000 files and folders." in refusal(api, "me/model")


def test_all_files_of_a_large_target_are_listed(api, push, monkeypatch):
    """An earlier merge among many files was none: its files stayed beside those of the next."""
    push("me/model", {f"{n:04}.txt": b"%d" % n for n in range(1100)} | {"lewis.lock": b"{}"})
    whole = api.model_info("me/model", files_metadata=True)
    digests = {file.path: file.digest for file in map(listed_file, whole.siblings)}

    whole.siblings = whole.siblings[:1000]
    monkeypatch.setattr(api, "model_info", lambda *_, **__: whole)
    assert read_target(HubRepo.to_publish(api, "me/model")).digests == digests


def test_a_repo_is_pinned_to_the_commit_that_a_branch_or_tag_means(api, push):
    first = push("tests/model", MODEL)
    api.create_tag("tests/model", tag="v1")
    second = push("tests/model", {"config.json": b"[]"})

    assert resolve_model(api, "tests/model").commit_sha == second
    assert resolve_model(api, "tests/model", "v1").commit_sha == first
    pinned = resolve_model(api, "tests/model", first)
    assert pinned.pinned == f"tests/model@{first}"
    assert pinned.file("model.safetensors").size_bytes == len(WEIGHTS)


def test_a_repos_digests_tell_large_files_from_small_ones(api, push):
    push("tests/model", MODEL)

    source = resolve_model(api, "tests/model")

    assert source.file("model.safetensors").digest == (
        "sha256:10fc3c51a152e90e5b90319b601d92ccf37290ef53c35ff92507687d8a911a08"
    )
    assert source.file("config.json").digest == "git-sha1:9e26dfeeb6e641a33dae4961196235bdb965b21b"


def test_a_range_of_a_repos_file_is_read_without_a_download(api, push, tmp_path):
    push("tests/model", MODEL)
    source = resolve_model(api, "tests/model")

    assert read_range(api, source, "model.safetensors", 250, 260) == WEIGHTS[250:260]
    assert read_range(api, source, "model.safetensors", 0, len(WEIGHTS)) == WEIGHTS
    assert read_range(api, source, "model.safetensors", 7, 7) == b""
    assert read_range(api, source, "config.json", 1, 2) == b"}"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_range_of_a_folders_file_is_read_from_disk(tmp_path, api):
    source = resolve_model(api, str(write(tmp_path, MODEL)))

    assert read_range(api, source, "model.safetensors", 250, 260) == WEIGHTS[250:260]


@pytest.mark.parametrize(
    ("path", "found"), [("model.safetensors", "has 2048 bytes"), ("nothing", "does not exist")]
)
def test_a_range_beyond_the_file_is_refused(tmp_path, api, path, found):
    source = resolve_model(api, str(write(tmp_path, MODEL)))

    with pytest.raises(SourceError) as raised:
        read_range(api, source, path, 2040, 2060)

    assert str(raised.value) == (
        f"{tmp_path}: bytes 2040 to 2060 of `{path}` were requested, but it {found}.\n"
        "The file is cut short or its index is wrong: use an intact copy."
    )


def test_small_files_are_read_and_missing_ones_are_none(api, push):
    push("tests/model", MODEL)
    source = resolve_model(api, "tests/model")

    assert read_small(api, source, "config.json") == b"{}"
    assert read_small(api, source, "README.md") is None


def test_a_missing_repo_says_where_it_was_looked_for(hub):
    anonymous = HfApi(endpoint=hub.url, token=False)

    assert refusal(anonymous, "tests/nothing") == (
        f"tests/nothing: no model of this name on {hub.url}.\n"
        "Check the spelling; if it is private, set HF_TOKEN or run `hf auth login`."
    )


def test_a_missing_repo_with_a_token_may_be_hidden_from_it(api):
    assert refusal(api, "tests/nothing") == (
        f"tests/nothing: no model of this name on {api.endpoint}, or it is private and this token "
        "may not see it.\nCheck the spelling, and whose token this is: `hf auth whoami`."
    )


def test_a_dataset_named_as_model_is_called_one(api, push):
    push("tests/sums", {"train.jsonl": b"{}\n"}, repo_type="dataset")

    assert refusal(api, "tests/sums") == (
        "tests/sums: this is a dataset, not a model.\nName a model."
    )


def test_a_missing_dataset_is_called_a_dataset(api):
    assert refusal(api, "tests/nothing", resolve=resolve_dataset).startswith(
        f"tests/nothing: no dataset of this name on {api.endpoint}"
    )


def test_a_missing_revision_lists_branches_and_tags(api, push):
    push("tests/model", MODEL)
    api.create_branch("tests/model", branch="dev")
    api.create_tag("tests/model", tag="v1")

    text = refusal(api, "tests/model", "v2")

    assert text.startswith("tests/model@v2: this model has no such revision.\nName one of its ")
    assert "dev" in text
    assert "main" in text
    assert text.endswith("; tags: v1; or a commit sha.")


def test_a_private_repo_is_not_shown_to_others(hub, api, push):
    push("tests/secret", MODEL, private=True)
    anonymous = HfApi(endpoint=hub.url, token=False)

    assert resolve_model(api, "tests/secret").name == "tests/secret"
    assert "if it is private, set HF_TOKEN" in refusal(anonymous, "tests/secret")


def test_a_gated_repo_says_where_to_ask_for_access(hub, api, push):
    push("tests/gated", MODEL)
    api.update_repo_settings("tests/gated", gated="manual")
    hub.add_token("hf_visitor", "visitor", "read")

    assert resolve_model(api, "tests/gated").file("config.json").size_bytes == 2
    assert refusal(hub.api("hf_visitor"), "tests/gated") == (
        "tests/gated: access is gated and this token has no access.\n"
        f"Ask for access at {hub.url}/tests/gated, then run the same command again."
    )
    assert refusal(HfApi(endpoint=hub.url, token=False), "tests/gated") == (
        "tests/gated: access is gated and there is no token.\n"
        f"Ask for access at {hub.url}/tests/gated, then set HF_TOKEN or run `hf auth login`."
    )


def test_a_token_that_the_hub_does_not_know_is_never_shown(hub, push):
    push("tests/model", MODEL)
    stranger = HfApi(endpoint=hub.url, token="hf_abcdefghijklmnop")

    assert refusal(stranger, "tests/model") == (
        f"tests/model: {hub.url} does not know this token.\nIt may be mistyped, expired or "
        "from another Hub: set HF_TOKEN or run `hf auth login`."
    )


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("first word\nlast-secret", "cannot reach HUB (Illegal header value b'<token>"),
        ("last-s\xe9cret", "the token has a letter that no token has"),
    ],
)
def test_a_token_that_cannot_be_sent_is_never_shown(hub, no_pauses, token, told):
    message = refusal(HfApi(endpoint=hub.url, token=token), "tests/model")

    assert message.startswith(f"tests/model: {told.replace('HUB', hub.url)}.\n")
    assert "last" not in message


def test_what_looks_like_a_token_never_reaches_a_message(hub):
    asked = HubRepo(hub.api(), "tests/model")

    error = asked.failed(f"sent {hub.write_token} as Bearer abc.def", "not hf_abcdefghijklmnop")

    assert str(error) == "tests/model: sent <token> as <token>.\nnot <token>"


JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJtZS9tb2RlbCJ9.c2lnbmVk-by_the-Hub"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no hf_jwt_0123456789abcdef here", "no <token> here"),
        (f"token=hf_jwt_{JWT}, or", "token=<token>, or"),
        (f"hf_oauth_{JWT}.", "<token>."),
        ("hf_abcd-efgh_ijkl.", "<token>."),
        (f"({JWT})", "(<token>)"),
        (JWT[:40], "<token>"),
        ("hf_jwt", "hf_jwt"),  # of no token
        ("keyJournalOfModels", "keyJournalOfModels"),
    ],
)
def test_tokens_of_any_kind_are_hidden_as_a_whole(hub, text, shown):
    assert HubRepo(hub.api(), "tests/model").redacted(text) == shown


def test_a_repo_with_pickled_weights_only_is_refused(api, push):
    sha = push("tests/model", {"pytorch_model.bin": b"x"})

    assert refusal(api, "tests/model") == (
        f"tests/model@{sha}: this repo has pickled weights only, and reading those can run code.\n"
        "Only safetensors are read. Convert it: load it in transformers, then "
        "`save_pretrained(FOLDER)`, and use FOLDER; or ask its author for safetensors.\n"
        "With `--allow-pickle` torch reads it without running its code, but a flaw in "
        "that reader would let its author run code here: allow it for authors that you trust."
    )
    assert resolve_model(api, "tests/model", allow_pickle=True).commit_sha == sha


def test_weights_of_another_kind_are_refused_whatever_is_allowed(api, push):
    push("tests/model", {"consolidated.00.pth": b"x"})

    with pytest.raises(SourceError, match="pickled weights only") as caught:
        resolve_model(api, "tests/model", allow_pickle=True)

    assert "--allow-pickle" not in str(caught.value)


# -- trouble on the way


def test_a_server_error_that_passes_is_not_noticed(api, push, hub, no_pauses):
    sha = push("tests/model", MODEL)
    hub.fail("/api/models/tests/model", 503, times=2)

    assert resolve_model(api, "tests/model").commit_sha == sha


def test_a_server_error_that_stays_is_told(api, push, hub, no_pauses):
    push("tests/model", MODEL)
    hub.fail("/api/models/tests/model", 503, times=100)

    assert refusal(api, "tests/model").startswith(
        f"tests/model: {api.endpoint} still fails with 503 after several attempts"
    )


def test_a_rate_limit_that_stays_is_told(api, push, hub, no_pauses):
    push("tests/model", MODEL)
    hub.fail("/api/models/tests/model", 429, times=100)

    assert refusal(api, "tests/model") == (
        f"tests/model: {api.endpoint} limits the rate of requests (429).\n"
        "Wait a few minutes, then run the same command again: finished work is kept."
    )


def test_an_unreachable_hub_says_what_is_cached(api, push, no_pauses):
    push("tests/model", MODEL)
    fetch(api, resolve_model(api, "tests/model"), lambda _: None)
    nowhere = HfApi(endpoint="http://127.0.0.1:1")

    assert refusal(nowhere, "tests/model") == (
        "tests/model: cannot reach http://127.0.0.1:1 ([Errno 111] Connection refused).\n"
        "Check the network and HF_ENDPOINT, then run the same command again: finished work is "
        f"kept. In the cache ({constants.HF_HUB_CACHE}): main. HF_HUB_OFFLINE=1 uses what is "
        "cached."
    )
    assert refusal(nowhere, "tests/other").endswith(
        f"It is not in the cache ({constants.HF_HUB_CACHE})."
    )


def test_a_hidden_file_is_no_file_of_a_model(api, push):
    push("tests/hidden", {"config.json": b"{}", ".w.safetensors": WEIGHTS})
    assert ": this repo has no .safetensors file.\n" in refusal(api, "tests/hidden")

    push("tests/both", {**MODEL, ".w.safetensors": WEIGHTS, ".a.jinja": b"a"})
    found = resolve_model(api, "tests/both").matching(("*.safetensors", "*.jinja"))
    assert [file.path for file in found] == ["model.safetensors"]


def test_offline_uses_what_is_cached_and_refuses_what_is_not(api, push, monkeypatch):
    sha = push("tests/model", MODEL)
    online = resolve_model(api, "tests/model")
    fetch(api, online, lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    source = resolve_model(api, "tests/model")

    assert source.commit_sha == sha
    assert source.files == online.matching(("*.json", "*.safetensors"))
    assert read_range(api, source, "model.safetensors", 0, 4) == WEIGHTS[:4]
    assert refusal(api, "tests/other") == (
        "tests/other: HF_HUB_OFFLINE is set and the cache does not hold all its files.\nUnset "
        "HF_HUB_OFFLINE, then run the same command again: finished work is kept. It is not in "
        f"the cache ({constants.HF_HUB_CACHE})."
    )


@pytest.mark.parametrize("revision", ["{outside}", "../../{name}", "a/../../../{name}"])
def test_a_revision_names_no_file_outside_of_the_cache(tmp_path, revision):
    outside = cache_root().parent / "outside"
    named = revision.format(outside=outside, name=outside.name)
    remember_revision("me/model", "model", named, "0" * 40)
    assert not outside.exists()

    remember_revision("me/model", "model", "a/branch", "0" * 40)
    (cache_folder("me/model", "model") / "snapshots" / ("0" * 40)).mkdir(parents=True)
    outside.write_text("0" * 40)
    assert cached_sha("me/model", "model", named) is None
    assert cached_sha("me/model", "model", "a/branch") == "0" * 40


def test_a_home_folder_of_nobody_is_a_path_that_does_not_exist():
    with pytest.raises(SourceError, match="no such file or folder: looked for"):
        resolve_model(HfApi(), "~nobody-here/base")
