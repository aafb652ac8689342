"""Answers of the embedded Hub about what a repository holds: trees, files, commits."""

from __future__ import annotations

import base64
import mimetypes
import time
from pathlib import PurePosixPath

from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from lewis_hub.hub import answers, xet
from lewis_hub.hub.access import Refusal
from lewis_hub.hub.call import Call
from lewis_hub.hub.commits import attributes_of, goes_to_lfs, read_proposal
from lewis_hub.hub.discussions import open_pull_request
from lewis_hub.hub.store import Commit, Repo, now

TREE_PAGE_SIZE = 1000
COMMITS_PAGE_SIZE = 50
SHOWN_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
FILE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


def tree(call: Call) -> Response:
    """GET .../tree/REVISION[/FOLDER]."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    folder = call.parts.get("path", "").strip("/")
    entries = answers.tree(commit.files, folder, recursive=call.flag("recursive"))
    if folder and not entries:
        raise Refusal(
            404, f'{folder} does not exist on "{call.parts["revision"]}"', "EntryNotFound"
        )
    if call.flag("expand"):
        entries = answers.with_last_commits(entries, call.store.history(repo, commit))
    return call.page(entries, call.number("limit", TREE_PAGE_SIZE))


def paths_info(call: Call) -> Response:
    """POST .../paths-info/REVISION: entries of the paths that exist."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    form = call.form()
    entries = []
    for path in form.get("paths", []):
        if path in commit.files:
            entries.append(answers.file_entry(path, commit.files[path]))
        elif any(answers.is_below(name, path) for name in commit.files):
            entries.append(answers.folder_entry(path, commit.files))
    if form.get("expand", ["false"])[0].lower() == "true":
        entries = answers.with_last_commits(entries, call.store.history(repo, commit))
    return JSONResponse(entries)


def commits(call: Call) -> Response:
    """GET .../commits/REVISION, newest first."""
    repo = call.seen_repo()
    history = call.store.history(repo, call.commit(repo))
    return call.page([answers.commit_entry(commit) for commit in history], COMMITS_PAGE_SIZE)


def resolve(call: Call) -> Response:
    """GET .../resolve/REVISION/PATH: the file, or for LFS where its bytes are."""
    repo = call.read_repo()
    commit = call.commit(repo)
    path = call.parts["path"]
    file = commit.files.get(path)
    headers = {"X-Repo-Commit": commit.sha}
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    if not file.lfs:
        headers |= FILE_HEADERS | {"ETag": f'"{file.oid}"'}
        where = call.store.blobs.path(file.sha256)
        return FileResponse(where, headers=headers, media_type=media_type(path))
    headers["X-Linked-Size"] = str(file.size_bytes)
    headers["X-Linked-Etag"] = f'"{file.sha256}"'
    url = call.hub.stored_url(file.sha256, PurePosixPath(path).name)
    return RedirectResponse(url, 302, headers)


def media_type(path: str) -> str:
    """Images as what they are, everything else as plain text or bytes: a page is never run."""
    guessed = mimetypes.guess_type(path)[0] or ""
    if path.lower().endswith(SHOWN_IMAGES):
        return guessed
    textual = guessed.startswith("text/") or guessed in ("application/json", "application/yaml")
    if textual or path.endswith((".jinja", ".jsonl", ".gitattributes")):
        return "text/plain; charset=utf-8"
    return "application/octet-stream"


def preupload(call: Call) -> Response:
    """POST .../preupload/REVISION: which files go to LFS, and what lies in their place now."""
    repo = call.seen_repo()
    check_may_commit(call, repo)
    commit = call.commit(repo)
    attributes = attributes_of(call.store, commit)
    modes = []
    for item in call.json().get("files", []):
        sample = base64.b64decode(item.get("sample", ""))
        large = goes_to_lfs(item["path"], int(item["size"]), sample, attributes)
        old = commit.files.get(item["path"])
        mode = {"path": item["path"], "uploadMode": "lfs" if large else "regular"}
        here = None if old is None else {"oid": old.sha256 if old.lfs else old.oid}
        modes.append({**mode, "shouldIgnore": False, **(here or {})})
    return JSONResponse({"files": modes, "commitOid": commit.sha})


def check_may_commit(call: Call, repo: Repo) -> str:
    """Refuse who may neither push nor propose; returns the caller's name."""
    if call.flag("create_pr") or call.parts["revision"].startswith("refs/pr/"):
        return call.proposer().user
    return call.writer(repo).user


def xet_token(call: Call) -> Response:
    """GET .../xet-write-token/REVISION: where the client's hf_xet may put chunks."""
    check_may_commit(call, call.seen_repo())
    expiry = int(time.time()) + xet.TOKEN_S
    token = {"casUrl": xet.new_upload(call.store.root), "accessToken": "local", "exp": expiry}
    names = {"casUrl": "Cas-Url", "accessToken": "Access-Token", "exp": "Token-Expiration"}
    headers = {f"X-Xet-{name}": str(token[key]) for key, name in names.items()}
    return JSONResponse(token, headers=headers)


def commit(call: Call) -> Response:
    """POST .../commit/REVISION: lines of JSON become one commit, or a pull request of one."""
    repo = call.seen_repo()
    author = check_may_commit(call, repo)
    with call.store.lock:
        base = call.commit(repo)
        proposal = read_proposal(call.store, base, call.body)
        if proposal.parent not in (None, base.sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        ref = call.store.find_ref(repo, call.parts["revision"])
        pull_request = None
        if call.flag("create_pr"):
            pull_request = open_pull_request(
                call.store, repo, base, author, (proposal.title, proposal.message)
            )
            ref = f"refs/pr/{pull_request}"
        if ref is None or ref.startswith("refs/tags/"):
            raise Refusal(400, f"{call.parts['revision']} is not a branch: commit to a branch")
        made = Commit(
            "", (base.sha,), author, now(), proposal.title, proposal.message, proposal.files
        )
        made = call.store.add_commit(repo, made, ref)
        xet.sweep(call.store.root, call.store.blobs)
    home = f"{call.endpoint}/{'datasets/' if repo.kind == 'datasets' else ''}{repo.id}"
    document = {
        "success": True,
        "commitOid": made.sha,
        "commitUrl": f"{home}/commit/{made.sha}",
        "hookOutput": "",
    }
    if pull_request is not None:
        document["pullRequestUrl"] = f"{home}/discussions/{pull_request}"
    return JSONResponse(document)
