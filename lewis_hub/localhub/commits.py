"""Commits and pull requests on the embedded Hub."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from starlette.responses import JSONResponse, Response

from lewis_hub.localhub import xet
from lewis_hub.localhub.access import Refusal
from lewis_hub.localhub.call import Call
from lewis_hub.localhub.repositories import object_id
from lewis_hub.localhub.store import (
    SHA256,
    Commit,
    File,
    PullRequest,
    Repo,
    Store,
    git_file,
    lfs_file,
    now,
)

REGULAR_LIMIT_BYTES = 10 * 2**20


def preupload(call: Call) -> Response:
    """POST .../preupload/REVISION: which files go to LFS, and the digest of the present file."""
    repo = call.seen_repo()
    call.committer(repo)
    commit = call.commit(repo)
    attributes = _attributes(call.store, commit)
    modes = []
    for item in call.json().get("files", []):
        sample = base64.b64decode(item.get("sample", ""))
        large = _goes_to_lfs(item["path"], int(item["size"]), sample, attributes)
        mode = {"path": item["path"], "uploadMode": "lfs" if large else "regular"}
        present = commit.files.get(item["path"])
        if present:
            mode["oid"] = present.sha256 if present.lfs else present.oid
        modes.append(mode | {"shouldIgnore": False})
    return JSONResponse({"files": modes, "commitOid": commit.sha})


def _attributes(store: Store, commit: Commit) -> str:
    file = commit.files.get(".gitattributes")
    return store.blobs.read(file.sha256).decode(errors="replace") if file else ""


def _goes_to_lfs(path: str, size_bytes: int, sample: bytes, attributes: str) -> bool:
    """Whether a file is stored as LFS: because of .gitattributes, its size or binary content."""
    if size_bytes == 0:
        return False
    if size_bytes > REGULAR_LIMIT_BYTES or b"\0" in sample:
        return True
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    name = PurePosixPath(path).name
    return any(fnmatch.fnmatchcase(path if "/" in p else name, p) for p in patterns)


def commits(call: Call) -> Response:
    """GET .../commits/REVISION, newest first."""
    repo = call.seen_repo()
    entries = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        for commit in repo.history(call.commit(repo))
    ]
    return JSONResponse(entries)


def xet_token(call: Call) -> Response:
    """GET .../xet-write-token/REVISION: where the client's hf_xet may write chunks."""
    call.committer(call.seen_repo())
    return JSONResponse(xet.new_upload(call.store.root))


def commit(call: Call) -> Response:
    """POST .../commit/REVISION: lines of JSON become one commit, or a pull request of one."""
    repo = call.seen_repo()
    author = call.committer(repo).user
    base = call.commit(repo)
    header, files = _read_changes(call.store, base, call.body)
    title, message = str(header["summary"]).strip(), str(header.get("description") or "")
    if header.get("parentCommit") not in (None, base.sha):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    document = {"success": True, "hookOutput": ""}
    ref = repo.find_ref(call.parts["revision"])
    if call.flag("create_pr"):
        opened = _open(call.store, repo, author, base, (title, message))
        ref = f"refs/pr/{opened.number}"
        document["pullRequestUrl"] = f"{call.endpoint}{repo.page}/discussions/{opened.number}"
    if ref is None or ref.startswith("refs/tags/"):
        raise Refusal(400, f"{call.parts['revision']} is not a branch: commit to a branch")
    made = Commit("", base.sha, author, now(), title, message, files)
    made = call.store.add_commit(repo, made, ref)
    xet.remove_stored(call.store.root, call.store.blobs)
    document |= {
        "commitOid": made.sha,
        "commitUrl": f"{call.endpoint}{repo.page}/commit/{made.sha}",
    }
    return JSONResponse(document)


def _read_changes(
    store: Store, base: Commit, body: bytes
) -> tuple[dict[str, Any], dict[str, File]]:
    """Apply the lines of a commit request, in order, to a commit's files.

    Returns:
        The header, with a summary, and the files after the commit.

    Raises:
        Refusal: a line is no JSON or names an unsafe path, a file to delete does not exist, or an
            LFS file was not uploaded.
    """
    header: dict[str, Any] = {}
    files = dict(base.files)
    for key, value in _lines(body):
        if key == "header":
            header = value
        elif key == "file":
            _put(files, value["path"], _regular_file(store, base, value))
        elif key == "lfsFile":
            _put(files, value["path"], _uploaded_file(store, value))
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                problem = f"A file with this name doesn't exist: {value['path']}"
                raise Refusal(404, problem, "EntryNotFound")
        else:
            raise Refusal(400, f"Unknown commit operation: {key}")
    if not str(header.get("summary", "")).strip():
        raise Refusal(400, "A commit needs a header line with a summary")
    return header, files


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in filter(None, map(bytes.strip, body.splitlines())):
        try:
            item = json.loads(line)
            yield item["key"], item["value"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(400, "A commit is lines of JSON with a key and a value") from None


def _put(files: dict[str, File], path: str, file: File) -> None:
    """Set a file; refuse a path outside the repository, and a path that is or has a folder."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or not path.isprintable():
        raise Refusal(400, f"Invalid path in repository: {path!r}")
    clashes = [str(parent) for parent in PurePosixPath(path).parents if str(parent) in files]
    clashes += [name for name in files if name.startswith(path + "/")]
    if clashes:
        raise Refusal(400, f"{path} and {clashes[0]} cannot both be files")
    files[path] = file


def _regular_file(store: Store, base: Commit, value: Mapping[str, Any]) -> File:
    try:
        content = base64.b64decode(value.get("content", ""), validate=True)
    except binascii.Error:
        raise Refusal(400, f"{value['path']}: content is not base64") from None
    sha256 = store.blobs.add(content)
    if _goes_to_lfs(value["path"], len(content), content[:512], _attributes(store, base)):
        return lfs_file(sha256, len(content))
    return git_file(content, sha256)


def _uploaded_file(store: Store, value: Mapping[str, Any]) -> File:
    oid = str(value.get("oid"))
    if not SHA256.fullmatch(oid):
        raise Refusal(400, f"{value['path']}: oid must be a SHA-256")
    if store.blobs.size_bytes(oid) is None:
        xet.take_in(store.root, oid, store.blobs.path(oid))
    size_bytes = store.blobs.size_bytes(oid)
    if size_bytes is None or size_bytes != value.get("size", size_bytes):
        problem = "Your push was rejected because an LFS pointer pointed to a file that does not"
        raise Refusal(400, f"{problem} exist: {value['path']}")
    return lfs_file(oid, size_bytes)


def create_pull_request(call: Call) -> Response:
    """POST .../discussions: an empty pull request."""
    repo = call.seen_repo()
    author = call.writer().user
    document = call.json()
    if not document.get("pullRequest"):
        raise Refusal(400, "This Hub has pull requests, and no other discussions")
    text = (str(document.get("title", "")), str(document.get("description", "")))
    opened = _open(call.store, repo, author, call.commit(repo, "main"), text)
    return JSONResponse({"num": opened.number, "pullRequest": True})


def _open(
    store: Store, repo: Repo, author: str, base: Commit, text: tuple[str, str]
) -> PullRequest:
    """Open a pull request, with title and description, whose branch starts at a commit."""
    opened = PullRequest(len(repo.pull_requests) + 1, *text, author, now())
    repo.pull_requests.append(opened)
    repo.refs[f"refs/pr/{opened.number}"] = base.sha
    store.save(repo)
    return opened


def pull_requests(call: Call) -> Response:
    """GET .../discussions: the pull requests, newest first. All are open."""
    repo = call.seen_repo()
    query = call.request.query_params
    shown = query.get("status") != "closed" and query.get("type") != "discussion"
    found = [_summary(repo, item) for item in reversed(repo.pull_requests) if shown]
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


def pull_request(call: Call) -> Response:
    """GET .../discussions/N: a pull request and its description, as a comment."""
    repo = call.seen_repo()
    item = next((i for i in repo.pull_requests if str(i.number) == call.parts["number"]), None)
    if item is None:
        raise Refusal(404, f"No pull request {call.parts['number']}", "EntryNotFound")
    comment = {
        "id": object_id(f"{repo.id} {item}"),
        "type": "comment",
        "author": {"name": item.author},
        "createdAt": item.created_at,
        "data": {"edited": False, "hidden": False, "latest": {"raw": item.description}},
    }
    changes = {"base": "refs/heads/main", "mergeCommitId": None}
    details = {"events": [comment], "changes": changes, "filesWithConflicts": [], "diff": ""}
    return JSONResponse(_summary(repo, item) | details)


def _summary(repo: Repo, item: PullRequest) -> dict[str, Any]:
    return {
        "num": item.number,
        "title": item.title,
        "author": {"name": item.author},
        "createdAt": item.created_at,
        "status": "open",
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": repo.noun},
    }
