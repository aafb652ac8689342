"""Commits and pull requests on the embedded Hub."""

from __future__ import annotations

import base64
import fnmatch
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from lewis_hub.documents import DocumentError, require_few_values
from lewis_hub.localhub import files
from lewis_hub.localhub.call import MAX_BODY_VALUES, Call, parsed, refusal
from lewis_hub.localhub.store import (
    SHA256,
    Commit,
    File,
    PullRequest,
    Repo,
    files_below,
    git_file,
    lfs_file,
    now,
    object_id,
)

REGULAR_LIMIT_BYTES = 10 * 2**20
MAX_PATTERNS = 1000  # of .gitattributes or .gitignore, each compared with the path of each file
MAX_PATH = 1000  # characters
MAX_FOLDERS = 50  # in each other: a list of files has an entry for each


@dataclass(frozen=True)
class Upload:
    """A file that a client asks how to upload; `sample` are its first bytes."""

    path: str
    size: NonNegativeInt
    sample: str = ""  # base64


@dataclass(frozen=True)
class Uploads:
    """The body of a preupload."""

    files: Annotated[list[Upload], Field(fail_fast=True)]


@dataclass(frozen=True)
class Value:
    """What a line of a commit says; each kind of line has some of these."""

    summary: str = ""
    description: str | None = None
    parent: Annotated[str | None, Field(validation_alias="parentCommit")] = None
    path: str = ""
    content: str = ""  # base64
    oid: str = ""
    size: NonNegativeInt | None = None


@dataclass(frozen=True)
class Line:
    """A line of a commit: the header, or a change of a file."""

    key: str
    value: Value


@dataclass(frozen=True)
class Discussion:
    """The body of a request for a pull request."""

    title: str = ""
    description: str = ""
    is_pull_request: Annotated[bool, Field(validation_alias="pullRequest")] = False


UPLOADS, LINE, DISCUSSION = TypeAdapter(Uploads), TypeAdapter(Line), TypeAdapter(Discussion)


def preupload(call: Call) -> dict[str, Any]:
    """POST .../preupload/REVISION: which files go to LFS or are ignored, and present digests."""
    repo = call.seen_repo()
    call.committer(repo)
    commit = call.commit(repo)
    large = _lfs_patterns(call, commit)
    ignored = _first_patterns(call.store.read_text(commit, ".gitignore").split())
    modes = []
    for item in parsed(UPLOADS, call.body).files:
        sample = _decoded(item.path, item.sample)
        is_large = _goes_to_lfs(item.path, item.size, sample, large)
        mode = {"path": item.path, "uploadMode": "lfs" if is_large else "regular"}
        if present := commit.files.get(item.path):
            mode["oid"] = present.sha256 if present.lfs else present.oid
        modes.append(mode | {"shouldIgnore": _matches(item.path, ignored)})
    return {"files": modes, "commitOid": commit.sha}


def _lfs_patterns(call: Call, commit: Commit) -> list[str]:
    """The patterns of `.gitattributes` whose files LFS stores."""
    lines = call.store.read_text(commit, ".gitattributes").splitlines()
    return _first_patterns(line.split()[0] for line in lines if "filter=lfs" in line)


def _first_patterns(patterns: Iterable[str]) -> list[str]:
    return list(islice(patterns, MAX_PATTERNS))


def _goes_to_lfs(path: str, size_bytes: int, sample: bytes, patterns: Sequence[str]) -> bool:
    """Whether LFS stores a file, which is decided by its size, first bytes and path."""
    if size_bytes == 0:
        return False
    if size_bytes > REGULAR_LIMIT_BYTES or b"\0" in sample:
        return True
    return _matches(path, patterns)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches a pattern as git means it, roughly."""
    name = PurePosixPath(path).name
    return any(fnmatch.fnmatchcase(path if "/" in p else name, p) for p in patterns)


def commits(call: Call) -> list[dict[str, Any]]:
    """GET .../commits/REVISION, newest first."""
    repo = call.seen_repo()
    return [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        for commit in repo.history(call.commit(repo))
    ]


def xet_token(call: Call) -> dict[str, Any]:
    """GET .../xet-write-token/REVISION."""
    return files.xet_token(call.store, call.committer(call.seen_repo()))


def commit(call: Call) -> dict[str, Any]:
    """POST .../commit/REVISION: lines of JSON become one commit, or a pull request of one."""
    repo = call.seen_repo()
    author = call.committer(repo).user
    base = call.commit(repo)
    header, changed = _read_changes(call, base)
    title, message = header.summary.strip(), header.description or ""
    if header.parent not in (None, base.sha):
        raise refusal(412, "A commit has happened since. Please refresh and try again.")
    document = {"success": True, "hookOutput": ""}
    ref = repo.find_ref(call.parts["revision"])
    if call.flag("create_pr"):
        opened = _open(call, repo, base, title, message)
        ref = f"refs/pr/{opened.number}"
        document["pullRequestUrl"] = f"{call.endpoint}{repo.page}/discussions/{opened.number}"
    if ref is None or ref.startswith("refs/tags/"):
        raise refusal(400, f"{call.parts['revision']} is not a branch: commit to a branch")
    made = Commit("", base.sha, author, now(), title, message, changed)
    made = call.store.add_commit(repo, made, ref)
    files.remove_stored_uploads(call.store)
    url = f"{call.endpoint}{repo.page}/commit/{made.sha}"
    return document | {"commitOid": made.sha, "commitUrl": url}


def _read_changes(call: Call, base: Commit) -> tuple[Value, dict[str, File]]:
    """Apply the lines of a commit request, in order; returns its header and the changed files.

    Raises:
        HTTPException: a line is no JSON or names an unsafe path, a file to delete does not exist,
            an LFS file was not uploaded, or there is no summary.
    """
    header = Value()
    changed, large = dict(base.files), _lfs_patterns(call, base)
    for line in _lines(call.body):
        key, value = line.key, line.value
        if key == "header":
            header = value
        elif key == "file":
            _put(changed, value.path, _regular_file(call, value, large))
        elif key == "lfsFile":
            _put(changed, value.path, _uploaded_file(call, value))
        elif key == "deletedFile":
            if changed.pop(value.path, None) is None:
                problem = f"A file with this name doesn't exist: {value.path}"
                raise refusal(404, problem, "EntryNotFound")
        else:
            raise refusal(400, f"Unknown commit operation: {key}")
    if not header.summary.strip():
        raise refusal(400, "A commit needs a header line with a summary")
    _require_files(changed, base)
    return header, changed


def _lines(body: bytes) -> Iterator[Line]:
    for line in filter(None, map(bytes.strip, io.BytesIO(body))):  # one at a time
        try:
            require_few_values(line, MAX_BODY_VALUES)
            yield LINE.validate_json(line)
        except DocumentError as error:
            raise refusal(400, f"A line of the commit: {error}") from None
        except ValidationError:
            raise refusal(400, "A commit is lines of JSON with a key and a value") from None


def _put(changed: dict[str, File], path: str, file: File) -> None:
    """Set a file; refuse a path outside the repository, and one that is too long."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or not path.isprintable():
        raise refusal(400, f"Invalid path in repository: {path!r}")
    if len(path) > MAX_PATH or len(parts) > MAX_FOLDERS:
        limit = f"{MAX_PATH:,} characters, and {MAX_FOLDERS} folders in each other"
        raise refusal(400, f"A path has at most {limit}: {path[:MAX_PATH]}")
    changed[path] = file


def _require_files(changed: Mapping[str, File], base: Commit) -> None:
    """Refuse a path that is a file and a folder."""
    folders = files_below(changed)
    if clash := next((path for path in changed if path in folders), None):
        inside = folders[clash][0]
        first, second = sorted((clash, inside), key=lambda path: path in base.files)  # new: first
        raise refusal(400, f"{first} and {second} cannot both be files")


def _regular_file(call: Call, value: Value, large: Sequence[str]) -> File:
    content = _decoded(value.path, value.content)
    sha256 = call.store.blobs.add(content)
    if _goes_to_lfs(value.path, len(content), content[:512], large):
        return lfs_file(sha256, len(content))
    return git_file(content, sha256)


def _decoded(path: str, content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except ValueError:
        raise refusal(400, f"{path}: content is not base64") from None


def _uploaded_file(call: Call, value: Value) -> File:
    oid, blobs = value.oid, call.store.blobs
    if not SHA256.fullmatch(oid):
        raise refusal(400, f"{value.path}: oid must be a SHA-256")
    if blobs.size_bytes(oid) is None:
        files.take_xet_upload(call.store, call.writer(), oid, blobs.path(oid))
    size_bytes = blobs.size_bytes(oid)
    if size_bytes is None or value.size not in (None, size_bytes):
        problem = "Your push was rejected because an LFS pointer pointed to a file that does not"
        raise refusal(400, f"{problem} exist: {value.path}")
    return lfs_file(oid, size_bytes)


def create_pull_request(call: Call) -> dict[str, Any]:
    """POST .../discussions: an empty pull request."""
    repo, asked = call.seen_repo(), parsed(DISCUSSION, call.body)
    if not asked.is_pull_request:
        raise refusal(400, "This Hub has pull requests, and no other discussions")
    opened = _open(call, repo, call.commit(repo), asked.title, asked.description)
    return {"num": opened.number, "pullRequest": True}


def _open(call: Call, repo: Repo, base: Commit, title: str, description: str) -> PullRequest:
    number = len(repo.pull_requests) + 1
    opened = PullRequest(number, title, description, call.writer().user, now())
    repo.pull_requests.append(opened)
    repo.refs[f"refs/pr/{number}"] = base.sha
    call.store.save(repo)
    return opened


def pull_requests(call: Call) -> dict[str, Any]:
    """GET .../discussions: the pull requests, maybe of one author, newest first. All are open."""
    repo, query = call.seen_repo(), call.request.query_params
    shown = query.get("status") != "closed" and query.get("type") != "discussion"
    listed = [one for one in repo.pull_requests if query.get("author") in (None, one.author)]
    found = [_summary(repo, item) for item in reversed(listed) if shown]
    return {"discussions": found, "count": len(found), "start": 0}


def pull_request(call: Call) -> dict[str, Any]:
    """GET .../discussions/N: a pull request and its description, as a comment."""
    repo = call.seen_repo()
    item = next((i for i in repo.pull_requests if str(i.number) == call.parts["number"]), None)
    if item is None:
        raise refusal(404, f"No pull request {call.parts['number']}", "EntryNotFound")
    comment = {
        "id": object_id(f"{repo.id} {item}"),
        "type": "comment",
        "author": {"name": item.author},
        "createdAt": item.created_at,
        "data": {"edited": False, "hidden": False, "latest": {"raw": item.description}},
    }
    changes = {"base": "refs/heads/main", "mergeCommitId": None}
    details = {"events": [comment], "changes": changes, "filesWithConflicts": [], "diff": ""}
    return _summary(repo, item) | details


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
