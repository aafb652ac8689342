"""Answers of the embedded Hub about accounts, and about repositories: files, settings and refs."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse, Response

from lewis_hub.documents import DocumentError, read_yaml
from lewis_hub.localhub.call import Call, refusal
from lewis_hub.localhub.hub import Grant
from lewis_hub.localhub.store import (
    Commit,
    File,
    Kind,
    Repo,
    files_below,
    git_file,
    now,
    object_id,
    short_digest,
)

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
REF_NAME = re.compile(r"(?!refs/|.*\.\.)[\w.+@=-]+(?:/[\w.+@=-]+)*", re.ASCII)  # none of others
TAKEN_NAMESPACES = ("api", "datasets", "lfs", "lfs-upload")  # other addresses begin with them
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # RFC 8693
PUBLISHER_TOKEN_S = 3600
MAX_PATHS = 100_000  # of a call
LFS_SUFFIXES = (
    "arrow bin ckpt gguf gz h5 model npy npz onnx parquet pickle pkl pt pth safetensors tar zip"
)
NEW_REPO_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()
)


def whoami(call: Call) -> dict[str, Any]:
    """GET /api/whoami-v2; the first user's right to all namespaces is an organisation `*`."""
    grant = call.signed_in()
    organisations = [name for name in grant.namespaces if name != grant.user]
    token = {"displayName": f"{grant.role} token", "role": grant.role}
    return {
        "type": "user",
        "id": object_id(grant.user),
        "name": grant.user,
        "fullname": grant.user,
        "avatarUrl": "data:,",  # Gradio reads it
        "orgs": [{"type": "org", "id": object_id(o), "name": o} for o in organisations],
        "auth": {"type": "access_token", "accessToken": token},
    }


def exchange_token(call: Call) -> dict[str, Any]:
    """POST /oauth/token: a token that may write one repository, or read a user's gated ones.

    The embedded Hub checks no signature: it compares the identity with those in `Hub.publishers`.
    """
    document = call.json()
    if document.get("grant_type") != TOKEN_EXCHANGE:
        raise refusal(400, "unsupported_grant_type")
    what = str(document.get("resource") or "")
    if not what or call.hub.publishers.get(str(document.get("subject_token"))) != what:
        raise refusal(403, f"No trusted publisher of {what} matches this identity")
    token = f"hf_jwt_{secrets.token_hex(16)}"
    if "/" in what:
        grant = Grant(token, "trusted-publisher", "write", (what,))
    else:
        known = [one for one in call.hub.grants.values() if one.user == what]
        owned = tuple(namespace for one in known for namespace in one.namespaces)
        grant = Grant(token, what, "read", owned, only_gated=True)
    call.hub.grants[token] = grant
    return {"access_token": token, "token_type": "bearer", "expires_in": PUBLISHER_TOKEN_S}


def validate_yaml(call: Call) -> Response:
    """POST /api/validate-yaml: check a card before anything is uploaded."""
    try:
        metadata = _card_metadata(str(call.json().get("content", "")))
    except DocumentError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": empty})


def _card_metadata(text: str) -> dict[str, Any]:
    """The metadata between a card's ``---`` lines, as JSON values; empty where there is none."""
    block = FRONT_MATTER.match(text)
    document = read_yaml(block[1]) if block else None
    if not isinstance(document, dict | None):
        raise DocumentError("the metadata must be a mapping")
    try:
        written = json.dumps(document or {}, default=str, allow_nan=False, ensure_ascii=False)
        metadata: dict[str, Any] = json.loads(written.encode())
    except (ValueError, TypeError) as error:  # keys, numbers, half letters
        raise DocumentError(f"the metadata cannot be read: {error}") from error
    return metadata


def create(call: Call) -> Response:
    """POST /api/repos/create."""
    document = {name: str(value) for name, value in call.json().items() if value}
    noun = document.get("type") or "model"
    kinds: dict[str, Kind] = {"model": "models", "dataset": "datasets"}
    kind = kinds.get(noun)
    if kind is None:
        raise refusal(400, f"This Hub keeps models and datasets, no {noun}")
    namespace = document.get("organization") or (call.grant.user if call.grant else "")
    repo = Repo(kind, namespace, str(document.get("name", "")), now(), _is_private(document))
    grant = call.owner(namespace, noun)
    valid = NAME.fullmatch(namespace) and NAME.fullmatch(repo.name)
    if not valid or namespace in TAKEN_NAMESPACES:
        raise refusal(400, f"Invalid repository name: {repo.id}")
    url = call.endpoint + repo.page
    if call.store.find(kind, repo.id):
        conflict = refusal(409, f"You already created this {noun} repo")
        return JSONResponse({"error": conflict.detail, "url": url}, 409, conflict.headers)
    content = NEW_REPO_ATTRIBUTES.encode()
    files = {".gitattributes": git_file(content, call.store.blobs.add(content))}
    first = Commit("", None, grant.user, now(), "initial commit", "", files)
    call.store.add_commit(repo, first, "refs/heads/main")
    return JSONResponse({"url": url, "name": repo.id, "id": repo.id})


def _is_private(document: Mapping[str, Any]) -> bool:
    return document.get("visibility") == "private" or bool(document.get("private"))


def settings(call: Call) -> dict[str, Any]:
    """PUT .../settings: make a repository private, public, gated or open."""
    document, repo = call.json(), call.owned_repo()
    if "visibility" in document or "private" in document:
        repo.private = _is_private(document)
    if "gated" in document:
        if document["gated"] not in (False, "auto", "manual"):
            raise refusal(400, "gated must be false, auto or manual")
        repo.gated = document["gated"]
    call.store.save(repo)
    return {"private": repo.private, "gated": repo.gated}


def auth_check(call: Call) -> dict[str, Any]:
    """GET .../auth-check[/write]: may the caller read, or write, the files?"""
    call.read_repo()
    if call.request.url.path.endswith("/write"):
        call.owned_repo()
    return {}


def info(call: Call) -> Response:
    """GET .../ and .../revision/REVISION: a repository at main or at a revision."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    try:
        metadata = _card_metadata(call.store.read_text(commit, "README.md"))
    except DocumentError:
        metadata = {}
    document = {
        "_id": object_id(f"{repo.kind}/{repo.id}"),
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": repo.created_at,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "tags": [],
        "cardData": metadata,
        "siblings": [
            _sibling(path, file, blobs=call.flag("blobs"))
            for path, file in sorted(commit.files.items())
        ],
    }
    named = ("library_name", "pipeline_tag") if repo.kind == "models" else ()
    document |= {name: metadata[name] for name in named if name in metadata}
    return JSONResponse(document, headers={"X-Repo-Commit": commit.sha})


def _sibling(path: str, file: File, *, blobs: bool) -> dict[str, Any]:
    sizes = {"size": file.size_bytes, "blobId": file.oid, **file.lfs_entry}
    return {"rfilename": path, **(sizes if blobs else {})}


def tree(call: Call) -> list[dict[str, Any]]:
    """GET .../tree/REVISION[/FOLDER]."""
    files = call.commit(call.seen_repo()).files
    folders = files_below(files)
    folder = call.parts.get("path", "").strip("/")
    below = f"{folder}/" if folder else ""
    found = [path for path in (*files, *folders) if path.startswith(below)]
    if folder and not found:
        problem = f'{folder} does not exist on "{call.parts["revision"]}"'
        raise refusal(404, problem, "EntryNotFound")
    if not call.flag("recursive"):
        found = [path for path in found if "/" not in path.removeprefix(below)]
    return [_entry(path, files, folders) for path in sorted(found)]


def paths_info(call: Call) -> list[dict[str, Any]]:
    """POST .../paths-info/REVISION: the entries of those paths that exist."""
    files = call.commit(call.seen_repo()).files
    folders = files_below(files)
    try:
        asked = parse_qs(call.body.decode(errors="replace"), max_num_fields=MAX_PATHS)
    except ValueError:
        raise refusal(400, f"The body: it has more than {MAX_PATHS:,} fields") from None
    paths = dict.fromkeys(asked.get("paths", []))  # each once: a folder's digest is of all files
    present = (path for path in paths if path in files or path in folders)
    return [_entry(path, files, folders) for path in present]


def _entry(
    path: str, files: Mapping[str, File], folders: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    file = files.get(path)
    if file is None:
        below = [f"{name} {files[name].oid}" for name in sorted(folders[path])]
        oid = short_digest("\n".join(below).encode())  # changes with the files
        return {"type": "directory", "oid": oid, "size": 0, "path": path}
    return {
        "type": "file",
        "oid": file.oid,
        "size": file.size_bytes,
        "path": path,
        **file.lfs_entry,
    }


def refs(call: Call) -> dict[str, Any]:
    """GET .../refs: branches and tags."""
    repo = call.seen_repo()
    document: dict[str, Any] = {"converts": []}
    for group, prefix in {"branches": "refs/heads/", "tags": "refs/tags/"}.items():
        document[group] = [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if ref.startswith(prefix)
        ]
    return document


def create_ref(call: Call) -> dict[str, Any]:
    """POST .../branch/NAME, and .../tag/REVISION with the tag's name in the body."""
    repo, document = call.owned_repo(), call.json()
    if "branch" in call.parts:
        kind, name, start = "heads", call.parts["branch"], document.get("startingPoint")
    else:
        kind, name, start = "tags", str(document.get("tag", "")), call.parts["revision"]
    if not REF_NAME.fullmatch(name):
        raise refusal(400, f"Invalid name of a branch or tag: {name}")
    ref = f"refs/{kind}/{name}"
    commit = call.commit(repo, str(start or "main"))
    if ref in repo.refs:
        raise refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit.sha
    call.store.save(repo)
    return {}
