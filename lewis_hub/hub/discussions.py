"""Pull requests and discussions on the embedded Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from lewis_hub.hub.access import Refusal
from lewis_hub.hub.answers import object_id
from lewis_hub.hub.blobs import write_json
from lewis_hub.hub.call import Call
from lewis_hub.hub.store import Commit, File, Repo, Store, now, read_json

PAGE_SIZE = 50


def discussions_of(store: Store, repo: Repo) -> list[dict[str, Any]]:
    """All discussions of a repository, the first first."""
    path = store.folder(repo) / "discussions.json"
    found: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return found


def open_pull_request(
    store: Store, repo: Repo, base: Commit, author: str, text: tuple[str, str]
) -> int:
    """Open a pull request against main whose branch ``refs/pr/N`` starts at `base`; returns N."""
    with store.lock:
        number = _open(store, repo, author, text, base.sha)
        store.set_ref(repo, f"refs/pr/{number}", base.sha)
    return number


def _open(store: Store, repo: Repo, author: str, text: tuple[str, str], base: str | None) -> int:
    known = discussions_of(store, repo)
    title, description = text
    known.append(
        {
            "num": len(known) + 1,
            "title": title,
            "author": author,
            "created_at": now(),
            "status": "open",
            "base": base,
            "merged_as": None,
            "events": [_comment(author, description)] if description else [],
        }
    )
    _save(store, repo, known)
    return len(known)


def _save(store: Store, repo: Repo, known: list[dict[str, Any]]) -> None:
    write_json(store.folder(repo) / "discussions.json", known)


def _event(kind: str, author: str, data: Mapping[str, Any]) -> dict[str, Any]:
    created = now()
    return {
        "id": object_id(f"{kind} {author} {created} {data}"),
        "type": kind,
        "author": {"name": author},
        "createdAt": created,
        "data": dict(data),
    }


def _comment(author: str, text: str) -> dict[str, Any]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    return _event("comment", author, data)


def create(call: Call) -> Response:
    """POST .../discussions: a discussion, or an empty pull request in draft."""
    repo = call.seen_repo()
    author = call.proposer().user
    asked = call.json()
    text = (str(asked.get("title", "")), str(asked.get("description", "")))
    with call.store.lock:
        if asked.get("pullRequest"):
            number = open_pull_request(call.store, repo, call.commit(repo, "main"), author, text)
        else:
            number = _open(call.store, repo, author, text, None)
    return JSONResponse({"num": number, "pullRequest": bool(asked.get("pullRequest"))})


def listing(call: Call) -> Response:
    """GET .../discussions, newest first, by pages."""
    repo = call.seen_repo()
    query = call.request.query_params
    found = [_summary(repo, item) for item in reversed(discussions_of(call.store, repo))]
    if query.get("type", "all") != "all":
        wants_pull_requests = query["type"] == "pull_request"
        found = [item for item in found if item["isPullRequest"] == wants_pull_requests]
    if query.get("status", "all") != "all":
        wants_open = query["status"] == "open"
        found = [item for item in found if (item["status"] in ("open", "draft")) == wants_open]
    if query.get("author"):
        found = [item for item in found if item["author"]["name"] == query["author"]]
    start = call.number("p", 0) * PAGE_SIZE
    page = found[start : start + PAGE_SIZE]
    return JSONResponse({"discussions": page, "count": len(found), "start": start})


def details(call: Call) -> Response:
    """GET .../discussions/N."""
    repo = call.seen_repo()
    item = _find(call, discussions_of(call.store, repo))
    document = {**_summary(repo, item), "events": item["events"]}
    if item["base"]:
        conflicts: list[str] = []
        if not item["merged_as"]:
            _, conflicts = merged_files(call.store, repo, item)
        document["changes"] = {"base": "refs/heads/main", "mergeCommitId": item["merged_as"]}
        document["filesWithConflicts"] = conflicts
        document["diff"] = ""
    return JSONResponse(document)


def comment(call: Call) -> Response:
    """POST .../discussions/N/comment."""
    return _append(call, lambda author, asked, _: _comment(author, str(asked.get("comment", ""))))


def change_status(call: Call) -> Response:
    """POST .../discussions/N/status: open or closed."""

    def changed(author: str, asked: Mapping[str, Any], item: dict[str, Any]) -> dict[str, Any]:
        if asked.get("status") not in ("open", "closed"):
            raise Refusal(400, "status must be open or closed")
        item["status"] = asked["status"]
        return _event("status-change", author, {"status": asked["status"]})

    return _append(call, changed)


def merge(call: Call) -> Response:
    """POST .../discussions/N/merge: bring a pull request's changes to main."""
    repo = call.seen_repo()
    call.writer(repo)

    def merged(author: str, _asked: Mapping[str, Any], item: dict[str, Any]) -> dict[str, Any]:
        if not item["base"] or item["status"] not in ("open", "draft"):
            raise Refusal(409, "This is no open pull request")
        files, conflicts = merged_files(call.store, repo, item)
        if conflicts:
            raise Refusal(409, f"main changed the same files: {', '.join(conflicts)}")
        main = call.commit(repo, "main")
        tip = call.commit(repo, f"refs/pr/{item['num']}")
        title = f"{item['title']} (#{item['num']})"
        made = Commit("", (main.sha, tip.sha), author, now(), title, "", files)
        item["merged_as"] = call.store.add_commit(repo, made, "refs/heads/main").sha
        item["status"] = "merged"
        return _event("status-change", author, {"status": "merged"})

    return _append(call, merged)


def merged_files(
    store: Store, repo: Repo, item: Mapping[str, Any]
) -> tuple[dict[str, File], list[str]]:
    """Main with a pull request's changes, and the files that both changed differently."""
    base, main, tip = (
        store.resolve(repo, revision)
        for revision in (item["base"], "main", f"refs/pr/{item['num']}")
    )
    if base is None or main is None or tip is None:
        raise Refusal(404, "Invalid rev id", "RevisionNotFound")
    files = dict(main.files)
    conflicts = []
    for path in sorted({*base.files, *tip.files}):
        old, new, here = base.files.get(path), tip.files.get(path), main.files.get(path)
        if new == old:
            continue
        if here not in (old, new):
            conflicts.append(path)
        files.pop(path, None)
        if new is not None:
            files[path] = new
    return files, conflicts


def _append(call: Call, make_event: Any) -> Response:
    """Change a discussion under the lock, and add what happened to its events."""
    repo = call.seen_repo()
    author = call.proposer().user
    with call.store.lock:
        known = discussions_of(call.store, repo)
        item = _find(call, known)
        event = make_event(author, call.json(), item)
        item["events"].append(event)
        _save(call.store, repo, known)
    return JSONResponse({"newMessage": event, "newStatus": event, "newTitle": event})


def _find(call: Call, known: list[dict[str, Any]]) -> dict[str, Any]:
    number = call.parts["number"]
    if not number.isdigit() or not 1 <= int(number) <= len(known):
        raise Refusal(404, f"No discussion {number}", "EntryNotFound")
    return known[int(number) - 1]


def _summary(repo: Repo, item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num": item["num"],
        "title": item["title"],
        "author": {"name": item["author"]},
        "createdAt": item["created_at"],
        "status": item["status"],
        "isPullRequest": item["base"] is not None,
        "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
    }
