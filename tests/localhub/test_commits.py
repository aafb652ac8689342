from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from lewis_hub.localhub.commits import MAX_PATTERNS
from lewis_hub.localhub.server import serve


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations, **named):
    message = {"commit_message": "Change"}
    return api.create_commit("acme/base", list(operations), **(message | named))


def content(api: HfApi, path: str, revision: str = "main") -> bytes:
    return Path(api.hf_hub_download("acme/base", path, revision=revision)).read_bytes()


def test_weights_go_to_large_storage_and_text_to_git(api, push, hub):
    weights = os.urandom(5000)
    push("acme/base", {"model.safetensors": weights, "config.json": b"{}"})

    by_path = {item.path: item for item in api.list_repo_tree("acme/base")}

    assert by_path["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert by_path["config.json"].lfs is None
    assert by_path["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's
    assert content(api, "model.safetensors") == weights
    assert content(api, "config.json") == b"{}"


def test_a_binary_file_is_large_whatever_its_name(api, push, hub):
    push("acme/base", {"map.png": b"\x89PNG\0", "note.png": b"text", "empty.bin": b""})

    stored = {item.path: item.lfs for item in api.list_repo_tree("acme/base")}

    assert stored["map.png"].size == 5
    assert stored["note.png"] is None
    assert stored["empty.bin"] is None


def test_only_the_first_patterns_are_compared_with_each_file(api, push, hub):
    kinds = [f"*.k{number} filter=lfs" for number in range(MAX_PATTERNS + 1)]
    push("acme/base", {".gitattributes": "\n".join(kinds).encode()})

    last = MAX_PATTERNS - 1
    push("acme/base", {f"a.k{last}": b"stored as LFS", f"a.k{last + 1}": b"stored by git"})

    stored = {item.path: item.lfs for item in api.list_repo_tree("acme/base")}
    assert stored[f"a.k{last}"].size == 13
    assert stored[f"a.k{last + 1}"] is None


def test_a_large_file_that_is_stored_already_is_not_sent_again(api, push, hub):
    weights = os.urandom(5000)
    push("acme/base", {"model.safetensors": weights})
    hub.fail("/lfs-upload/", 500, times=100)

    push("acme/copy", {"weights.safetensors": weights})

    assert api.get_paths_info("acme/copy", "weights.safetensors")[0].size == 5000


def test_bytes_that_are_not_what_they_claim_are_refused(hub, api):
    oid = hashlib.sha256(b"promised").hexdigest()
    api.create_repo("acme/base")
    batch = httpx.post(
        f"{hub.url}/acme/base.git/info/lfs/objects/batch",
        json={"objects": [{"oid": oid, "size": 8}]},
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )
    (asked,) = batch.json()["objects"]

    answer = httpx.put(asked["actions"]["upload"]["href"], content=b"sent instead")

    assert answer.status_code == 400
    assert f"not {oid}" in answer.json()["error"]
    assert hub.store.blobs.size_bytes(oid) is None


def test_bytes_of_somebody_without_a_token_are_not_stored(hub, api, push):
    push("acme/base", {"m.bin": b"x" * 3000})
    address = httpx.head(f"{hub.url}/acme/base/resolve/main/m.bin").headers["Location"]
    stored, new = (hashlib.sha256(content).hexdigest() for content in (b"x" * 3000, b"new"))
    to_read = address.partition("?")[2]  # anyone may read this repo

    for oid, query in ((new, ""), (new, "signature=00"), (stored, to_read), (new, to_read)):
        refused = httpx.put(f"{hub.storage_url}/lfs-upload/{oid}?{query}", content=b"new")
        assert refused.status_code == 403
    assert hub.store.blobs.size_bytes(new) is None


def test_an_address_without_a_digest_stores_and_gives_nothing(hub):
    assert httpx.get(f"{hub.storage_url}/lfs/%2e%2e/x").status_code == 404
    assert httpx.put(f"{hub.storage_url}/lfs-upload/%2e%2e", content=b"").status_code == 404


def test_a_large_file_nobody_sent_cannot_be_committed(hub, api):
    api.create_repo("acme/base")
    oid = "0" * 64
    lines = (
        '{"key": "header", "value": {"summary": "x"}}\n'
        f'{{"key": "lfsFile", "value": {{"path": "m.bin", "algo": "sha256", "oid": "{oid}"}}}}\n'
    )

    answer = httpx.post(
        f"{hub.url}/api/models/acme/base/commit/main",
        content=lines,
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )

    assert answer.status_code == 400
    assert "an LFS pointer pointed to a file that does not exist: m.bin" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../x", "a//b", ".git/config", "a\nb"])
def test_a_path_outside_the_repository_is_refused(hub, api, path):
    api.create_repo("acme/base")
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
    ]

    answer = httpx.post(
        f"{hub.url}/api/models/acme/base/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )

    assert answer.status_code == 400
    assert answer.json()["error"] == f"Invalid path in repository: {path!r}"


HEADER = '{"key": "header", "value": {"summary": "x"}}'
LONGEST = "1,000 characters, and 50 folders in each other"


def put(path: str, content: str) -> str:
    return json.dumps({"key": "file", "value": {"path": path, "content": content}})


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([HEADER, "{"], "A commit is lines of JSON with a key and a value"),
        ([HEADER, "[1]"], "A commit is lines of JSON with a key and a value"),
        ([HEADER, '{"key": "file"}'], "A commit is lines of JSON with a key and a value"),
        ([put("b.txt", "eA==")], "A commit needs a header line with a summary"),
        ([HEADER, put("b.txt", "*")], "b.txt: content is not base64"),
        ([HEADER, put("a.txt/b", "eA==")], "a.txt/b and a.txt cannot both be files"),
        ([HEADER, put("old", "eA==")], "old and old/b.txt cannot both be files"),
        ([HEADER, put("é" * 1001, "eA==")], f"A path has at most {LONGEST}: {'é' * 1000}"),
        ([HEADER, put("a/" * 50 + "b", "eA==")], f"A path has at most {LONGEST}: {'a/' * 50}b"),
    ],
)
def test_a_malformed_commit_is_refused_and_changes_nothing(hub, api, push, lines, problem):
    before = push("acme/base", {"a.txt": b"a", "old/b.txt": b"b"})

    answer = httpx.post(
        f"{hub.url}/api/models/acme/base/commit/main",
        content="\n".join(lines),
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )

    assert (answer.status_code, answer.json()["error"]) == (400, problem)
    assert api.repo_info("acme/base").sha == before


def test_a_binary_file_that_is_sent_to_git_is_stored_as_large(hub, api, push):
    push("acme/base", {"a.txt": b"a"})

    httpx.post(
        f"{hub.url}/api/models/acme/base/commit/main",
        content=f"{HEADER}\n{put('map.png', 'AHg=')}",
        headers={"Authorization": f"Bearer {hub.write_token}"},
    ).raise_for_status()

    assert api.get_paths_info("acme/base", "map.png")[0].lfs.size == 2


def test_files_are_deleted(api, push, hub):
    push("acme/base", {"a.txt": b"a", "old/b.txt": b"b", "m.bin": b"\0m"})

    commit(api, CommitOperationDelete("a.txt"), CommitOperationDelete("old/b.txt"))

    assert sorted(api.list_repo_files("acme/base")) == [".gitattributes", "m.bin"]


def test_deleting_what_is_not_there_is_an_error(api, push, hub):
    push("acme/base", {"a.txt": b"a"})

    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        commit(api, CommitOperationDelete("b.txt"))


def test_a_stale_parent_is_refused_and_nothing_changes(api, push, hub):
    stale = push("acme/base", {"a.txt": b"a"})
    tip = push("acme/base", {"a.txt": b"b"})

    with pytest.raises(HfHubHTTPError) as raised:
        commit(api, add("a.txt", b"c"), parent_commit=stale)

    assert raised.value.response.status_code == 412
    assert "A commit has happened since. Please refresh and try again." in str(raised.value)
    assert api.model_info("acme/base").sha == tip
    assert commit(api, add("a.txt", b"c"), parent_commit=tip).oid != tip


def test_files_that_did_not_change_make_no_commit(api, push, hub):
    files = {"config.json": b"{}", "model.safetensors": b"\0weights"}
    sha = push("acme/base", files)

    again = commit(api, *(add(path, content) for path, content in files.items()))

    assert again.oid == sha
    assert len(api.list_repo_commits("acme/base")) == 2


def test_branches_may_have_slashes_and_tags_stay_where_they_are(api, push, hub):
    first = push("acme/base", {"a.txt": b"one"})
    api.create_tag("acme/base", tag="v1.0")
    api.create_branch("acme/base", branch="feature/guided/x")
    made = commit(api, add("a.txt", b"two"), revision="feature/guided/x")
    push("acme/base", {"a.txt": b"three"})

    refs = api.list_repo_refs("acme/base")

    assert content(api, "a.txt", "v1.0") == b"one"
    assert content(api, "a.txt", "feature/guided/x") == b"two"
    assert content(api, "a.txt", made.oid) == b"two"
    assert content(api, "a.txt") == b"three"
    assert [ref.name for ref in refs.branches] == ["main", "feature/guided/x"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1.0", first)]
    titles = [c.title for c in api.list_repo_commits("acme/base", revision="feature/guided/x")]
    assert titles == ["Change", "Put files", "initial commit"]


def test_refs_are_made_once(api, push, hub):
    push("acme/base", {"a.txt": b"one"})
    api.create_branch("acme/base", branch="dev")
    api.create_tag("acme/base", tag="v1")

    with pytest.raises(HfHubHTTPError, match="Reference already exists: refs/heads/dev"):
        api.create_branch("acme/base", branch="dev")
    with pytest.raises(HfHubHTTPError, match="Reference already exists: refs/tags/v1"):
        api.create_tag("acme/base", tag="v1")
    api.create_branch("acme/base", branch="dev", exist_ok=True)
    api.create_tag("acme/base", tag="v1", exist_ok=True)

    refs = api.list_repo_refs("acme/base")
    assert [ref.name for ref in refs.branches] == ["main", "dev"]
    assert [ref.name for ref in refs.tags] == ["v1"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/base", revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        commit(api, add("a.txt", b"x"), revision="nowhere")


def test_a_commit_can_become_a_pull_request(api, push, hub):
    push("acme/base", {"a.txt": b"one"})

    made = commit(api, add("b.txt", b"new"), create_pr=True, commit_description="Because.")

    assert made.pr_url == f"{hub.url}/acme/base/discussions/1"
    assert made.pr_revision == "refs/pr/1"
    assert content(api, "b.txt", "refs/pr/1") == b"new"
    assert "b.txt" not in api.list_repo_files("acme/base")
    (item,) = api.get_repo_discussions("acme/base")
    assert (item.title, item.status, item.is_pull_request) == ("Change", "open", True)
    assert api.get_discussion_details("acme/base", 1).events[0].content == "Because."
    assert list(api.get_repo_discussions("acme/base", discussion_status="closed")) == []


def test_a_stranger_may_propose_weights_but_not_push_them(api, push, hub):
    push("acme/base", {"a.txt": b"one"})
    hub.add_token("hf_stranger", "stranger", "write")
    stranger = hub.api("hf_stranger")

    with pytest.raises(HfHubHTTPError, match="403"):
        commit(stranger, add("m.safetensors", b"\0weights"))
    made = commit(stranger, add("m.safetensors", b"\0weights"), create_pr=True)

    assert content(api, "m.safetensors", made.pr_revision) == b"\0weights"
    assert api.get_discussion_details("acme/base", made.pr_num).author == "stranger"


def test_a_pull_request_can_be_opened_first_and_filled_later(api, push, hub):
    push("acme/base", {"a.txt": b"one"})

    request = api.create_pull_request("acme/base", title="Draft")
    commit(api, add("a.txt", b"two"), revision=request.git_reference)
    push("acme/base", {"a.txt": b"three"})

    assert api.get_discussion_details("acme/base", request.num).title == "Draft"
    assert content(api, "a.txt", "refs/pr/1") == b"two"
    assert content(api, "a.txt") == b"three"


def test_commits_at_the_same_time_all_land(api, push, hub):
    push("acme/base", {"a.txt": b"one"})

    def write(number: int) -> str:
        return str(commit(hub.api(), add(f"{number}.txt", str(number).encode())).oid)

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(write, range(16)))

    history = [c.commit_id for c in api.list_repo_commits("acme/base")]
    assert len(made) == 16
    assert set(history[:16]) == made
    assert {f"{n}.txt" for n in range(16)} <= set(api.list_repo_files("acme/base"))


def test_everything_is_there_after_a_restart(tmp_path):
    with serve(tmp_path) as hub:
        first, token = hub.api(), hub.write_token
        hub.add_token("hf_other", "other", "read")
        first.create_repo("acme/base", private=True)
        made = commit(first, add("model.safetensors", b"\0weights"), add("a.txt", b"a"))
        first.create_tag("acme/base", tag="v1")
        commit(first, add("a.txt", b"b"), create_pr=True)

    with serve(tmp_path) as hub:
        assert hub.write_token == token
        again = hub.api()
        info = again.model_info("acme/base", revision="v1")
        paths = ["model.safetensors", "a.txt"]
        assert (info.sha, info.private) == (made.oid, True)
        assert [len(httpx_get(again, path)) for path in paths] == [8, 1]
        assert len(list(again.get_repo_discussions("acme/base"))) == 1
        assert hub.api("hf_other").whoami()["name"] == "other"


def test_a_hub_restarts_whatever_its_namespaces_are_called(tmp_path):
    with serve(tmp_path) as hub:
        hub.api().create_repo("acme.json/base.json")

    with serve(tmp_path) as hub:
        assert hub.api().model_info("acme.json/base.json").id == "acme.json/base.json"


def test_many_files_in_deep_folders_are_committed_and_listed_soon(hub, api):
    api.create_repo("acme/base")
    lines = "\n".join([HEADER, *(put(f"{n}/{'f/' * 48}x", "eA==") for n in range(1000))])
    address, own = f"{hub.url}/api/models/acme/base", {"Authorization": f"Bearer {hub.write_token}"}

    began = time.process_time()
    for _ in range(2):
        made = httpx.post(f"{address}/commit/main", content=lines, headers=own, timeout=60)
        assert made.status_code == 200
    listed = httpx.get(f"{address}/tree/main?recursive=1", timeout=60).json()

    assert time.process_time() - began < 4
    assert len(listed) == 1 + 1000 * 50
    (folder,) = httpx.get(f"{address}/tree/main/7").json()
    assert (folder["type"], folder["path"]) == ("directory", "7/f")


def httpx_get(api: HfApi, path: str) -> bytes:
    url = f"{api.endpoint}/acme/base/resolve/v1/{path}"
    headers = {"Authorization": f"Bearer {api.token}"}
    return bytes(httpx.get(url, headers=headers, follow_redirects=True).content)


def test_a_card_with_broken_metadata_is_refused_before_any_upload(api, hub):
    api.create_repo("acme/base")

    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        commit(api, add("README.md", b"---\na: [1\n---\n"))
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        commit(api, add("README.md", b"# No metadata\n"))
