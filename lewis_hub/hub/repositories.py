"""Answers of the embedded Hub about repositories as a whole: accounts, settings, lists, refs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response

from lewis_hub.hub import answers
from lewis_hub.hub.access import Refusal, check_sees, check_writes, not_found
from lewis_hub.hub.call import Call
from lewis_hub.hub.card import card_metadata
from lewis_hub.hub.commits import first_commit
from lewis_hub.hub.store import KINDS, NAME, Kind, Repo, now

PAGE_SIZE = 1000
TAKEN_NAMESPACES = ("api", "datasets", "lfs", "lfs-upload")  # by other addresses


def whoami(call: Call) -> Response:
    """GET /api/whoami-v2."""
    if call.grant is None:
        raise Refusal(401, "Invalid username or password.")
    return JSONResponse(answers.user_info(call.grant))


def validate_yaml(call: Call) -> Response:
    """POST /api/validate-yaml: check a card before anything is uploaded."""
    try:
        metadata = card_metadata(str(call.json().get("content", "")))
    except yaml.YAMLError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": empty})


def create(call: Call) -> Response:
    """POST /api/repos/create."""
    asked = call.json()
    kind = _kind(asked)
    namespace = asked.get("organization") or (call.grant.user if call.grant else "")
    name = str(asked.get("name", ""))
    grant = check_writes(call.grant, namespace, kind.removesuffix("s"))
    valid = NAME.fullmatch(namespace) and NAME.fullmatch(name)
    if not valid or namespace in TAKEN_NAMESPACES:
        raise Refusal(400, f"Invalid repository name: {namespace}/{name}")
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = Repo(kind, namespace, name, now(), private)
    url = f"{call.endpoint}/{_prefix(kind)}{repo.id}"
    with call.store.lock:
        if call.store.find(kind, namespace, name) is not None:
            noun = kind.removesuffix("s")
            fields = {"url": url}
            raise Refusal(409, f"You already created this {noun} repo", fields=fields)
        call.store.sweep(repo)
        first_commit(call.store, repo, grant.user)
        call.store.save(repo)
    return JSONResponse({"url": url, "name": repo.id, "id": repo.id})


def delete(call: Call) -> Response:
    """DELETE /api/repos/delete."""
    asked = call.json()
    namespace = asked.get("organization") or (call.grant.user if call.grant else "")
    repo = call.store.find(_kind(asked), namespace, str(asked.get("name", "")))
    if repo is None:
        raise not_found(call.grant)
    check_sees(call.grant, repo)
    call.writer(repo)
    call.store.delete(repo)
    return JSONResponse({})


def _kind(asked: dict[str, Any]) -> Kind:
    kind = f"{asked.get('type') or 'model'}s"
    if kind not in KINDS:
        raise Refusal(400, f"This Hub keeps models and datasets, no {kind}")
    return kind


def _prefix(kind: Kind) -> str:
    return "datasets/" if kind == "datasets" else ""


def settings(call: Call) -> Response:
    """PUT .../settings: make a repository private, public, gated or open."""
    asked = call.json()
    with call.store.lock:
        repo = call.seen_repo()
        call.writer(repo)
        if "visibility" in asked or "private" in asked:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = replace(repo, private=private)
        if "gated" in asked:
            if asked["gated"] not in (False, "auto", "manual"):
                raise Refusal(400, "gated must be false, auto or manual")
            repo = replace(repo, gated=asked["gated"])
        call.store.save(repo)
    return JSONResponse({"private": repo.private, "gated": repo.gated})


def grant_access(call: Call) -> Response:
    """POST .../user-access-request/grant: let a user read a gated repository."""
    with call.store.lock:
        repo = call.seen_repo()
        call.writer(repo)
        user = str(call.json().get("user", ""))
        granted = tuple(dict.fromkeys((*repo.granted, user)))
        call.store.save(replace(repo, granted=granted))
    return JSONResponse({})


def auth_check(call: Call) -> Response:
    """GET .../auth-check: may the caller have the files?"""
    call.read_repo()
    return JSONResponse({})


def auth_check_write(call: Call) -> Response:
    """GET .../auth-check/write: may the caller change them?"""
    call.writer(call.read_repo())
    return JSONResponse({})


def listing(call: Call) -> Response:
    """GET /api/models, /api/datasets: what the caller may see, newest first."""
    kind = call.parts["kind"]
    if kind not in KINDS:
        raise Refusal(404, "This Hub lists models and datasets")
    if call.parts["kind"] not in KINDS:
        raise Refusal(404, "This Hub lists models and datasets")
    query = call.request.query_params
    wanted, author = query.get("search", "").lower(), query.get("author")
    filters = set(query.getlist("filter"))
    found = []
    for repo in call.store.repos(kind):
        hidden = repo.private and not (call.grant and call.grant.owns(repo.id))
        if hidden or wanted not in repo.id.lower() or author not in (None, repo.namespace):
            continue
        info = answers.repo_info(call.store, repo, call.commit(repo, "main"), blobs=False)
        if filters <= set(info["tags"]):
            found.append(info)
    found.sort(key=lambda info: info["lastModified"], reverse=True)
    return call.page(found, call.number("limit", PAGE_SIZE))


def info(call: Call) -> Response:
    """GET a repository, at main or at a revision."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    described = answers.repo_info(call.store, repo, commit, blobs=call.flag("blobs"))
    return JSONResponse(described, headers={"X-Repo-Commit": commit.sha})


def refs(call: Call) -> Response:
    """GET .../refs: branches, tags and, on demand, pull requests."""
    known = call.store.refs(call.seen_repo())
    groups = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    if not call.flag("include_prs"):
        del groups["pullRequests"]
    document: dict[str, Any] = {"converts": []}
    for group, prefix in groups.items():
        document[group] = [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in known.items()
            if ref.startswith(prefix)
        ]
    for item in document.get("pullRequests", ()):
        item["name"] = item["ref"]
    return JSONResponse(document)


def create_ref(call: Call) -> Response:
    """POST .../branch/NAME, and .../tag/REVISION with the tag's name in the body."""
    repo = call.seen_repo()
    call.writer(repo)
    asked = call.json()
    if "branch" in call.parts:
        ref, start = f"refs/heads/{call.parts['branch']}", asked.get("startingPoint")
    else:
        ref, start = f"refs/tags/{asked.get('tag', '')}", call.parts["revision"]
    check_ref(ref)
    commit = call.commit(repo, start or "main")
    with call.store.lock:
        if ref in call.store.refs(repo):
            raise Refusal(409, f"Reference already exists: {ref}")
        call.store.set_ref(repo, ref, commit.sha)
    return JSONResponse({})


def delete_ref(call: Call) -> Response:
    """DELETE .../branch/NAME or .../tag/NAME."""
    repo = call.seen_repo()
    call.writer(repo)
    branch = call.parts.get("branch")
    ref = f"refs/heads/{branch}" if branch else f"refs/tags/{call.parts['revision']}"
    if branch == "main":
        raise Refusal(403, "The branch main cannot be deleted")
    with call.store.lock:
        if ref not in call.store.refs(repo):
            raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        call.store.set_ref(repo, ref, None)
    return JSONResponse({})


def check_ref(ref: str) -> None:
    """Refuse a name that git would not take."""
    parts = ref.split("/")
    bad = any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    if (
        bad
        or ".." in ref
        or "@{" in ref
        or set(ref) & set(" ~^:?*[\\\x7f")
        or not ref.isprintable()
    ):
        raise Refusal(400, f"Invalid reference name: {ref}")
