"""Answers of the embedded Hub about accounts, and about repositories, their settings and refs."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response

from lewis_hub.localhub.access import Grant, Refusal
from lewis_hub.localhub.call import Call
from lewis_hub.localhub.files import lfs_sizes
from lewis_hub.localhub.store import (
    KINDS,
    NAME,
    Commit,
    File,
    Kind,
    Repo,
    Store,
    git_file,
    now,
    short_digest,
)

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
TAKEN_NAMESPACES = ("api", "datasets", "lfs", "lfs-upload")  # other addresses begin with them
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # RFC 8693
PUBLISHER_TOKEN_S = 3600
LFS_SUFFIXES = (
    "arrow bin ckpt gguf gz h5 model npy npz onnx parquet pickle pkl pt pth safetensors tar zip"
)
NEW_REPO_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()
)


def whoami(call: Call) -> Response:
    """GET /api/whoami-v2; the first user's right to all namespaces is an organisation `*`."""
    grant = call.grant
    if grant is None:
        raise Refusal(401, "Invalid username or password.")
    organisations = [name for name in grant.namespaces if name != grant.user]
    token = {"displayName": f"{grant.role} token", "role": grant.role}
    return JSONResponse(
        {
            "type": "user",
            "id": object_id(grant.user),
            "name": grant.user,
            "fullname": grant.user,
            "orgs": [{"type": "org", "id": object_id(o), "name": o} for o in organisations],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def exchange_token(call: Call) -> Response:
    """POST /oauth/token: a trusted publisher gets a token that may write one repository.

    The embedded Hub checks no signature: it compares the identity with those in `Hub.publishers`.
    """
    document = call.json()
    if document.get("grant_type") != TOKEN_EXCHANGE:
        raise Refusal(400, "unsupported_grant_type")
    repo = document.get("resource")
    if not repo or call.hub.publishers.get(str(document.get("subject_token"))) != repo:
        raise Refusal(403, f"No trusted publisher of {repo} matches this identity")
    token = f"hf_jwt_{secrets.token_hex(16)}"
    call.hub.grants[token] = Grant(token, "trusted-publisher", "write", (str(repo),))
    answer = {"access_token": token, "token_type": "bearer", "expires_in": PUBLISHER_TOKEN_S}
    return JSONResponse(answer)


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
    document = call.json()
    kind: Kind = "datasets" if document.get("type") == "dataset" else "models"
    if f"{document.get('type') or 'model'}s" not in KINDS:
        raise Refusal(400, f"This Hub keeps models and datasets, no {document['type']}")
    namespace = document.get("organization") or (call.grant.user if call.grant else "")
    repo = Repo(kind, namespace, str(document.get("name", "")), now(), _is_private(document))
    grant = call.owner(namespace, repo.noun)
    valid = NAME.fullmatch(namespace) and NAME.fullmatch(repo.name)
    if not valid or namespace in TAKEN_NAMESPACES:
        raise Refusal(400, f"Invalid repository name: {repo.id}")
    url = call.endpoint + repo.page
    if call.store.find(kind, repo.id):
        raise Refusal(409, f"You already created this {repo.noun} repo", fields={"url": url})
    content = NEW_REPO_ATTRIBUTES.encode()
    files = {".gitattributes": git_file(content, call.store.blobs.add(content))}
    first = Commit("", None, grant.user, now(), "initial commit", "", files)
    call.store.add_commit(repo, first, "refs/heads/main")
    return JSONResponse({"url": url, "name": repo.id, "id": repo.id})


def _is_private(document: dict[str, Any]) -> bool:
    return document.get("visibility") == "private" or bool(document.get("private"))


def settings(call: Call) -> Response:
    """PUT .../settings: make a repository private, public, gated or open."""
    document = call.json()
    repo = call.seen_repo()
    call.owner(repo.id, repo.noun)
    if "visibility" in document or "private" in document:
        repo.private = _is_private(document)
    if "gated" in document:
        if document["gated"] not in (False, "auto", "manual"):
            raise Refusal(400, "gated must be false, auto or manual")
        repo.gated = document["gated"]
    call.store.save(repo)
    return JSONResponse({"private": repo.private, "gated": repo.gated})


def auth_check(call: Call) -> Response:
    """GET .../auth-check: may the caller read the files?"""
    call.read_repo()
    return JSONResponse({})


def auth_check_write(call: Call) -> Response:
    """GET .../auth-check/write: may the caller change the files?"""
    repo = call.read_repo()
    call.owner(repo.id, repo.noun)
    return JSONResponse({})


def info(call: Call) -> Response:
    """GET .../ and .../revision/REVISION: a repository at main or at a revision."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    try:
        metadata = card_metadata(card_text(call.store, commit))
    except yaml.YAMLError:
        metadata = {}
    blobs = call.flag("blobs")
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
            {"rfilename": path, **(_sizes(file) if blobs else {})}
            for path, file in sorted(commit.files.items())
        ],
    }
    named = ("library_name", "pipeline_tag") if repo.kind == "models" else ()
    document |= {name: metadata[name] for name in named if name in metadata}
    return JSONResponse(document, headers={"X-Repo-Commit": commit.sha})


def _sizes(file: File) -> dict[str, Any]:
    sizes: dict[str, Any] = {"size": file.size_bytes, "blobId": file.oid}
    if file.lfs:
        sizes["lfs"] = {"sha256": file.sha256, **lfs_sizes(file)}
    return sizes


def refs(call: Call) -> Response:
    """GET .../refs: branches and tags."""
    repo = call.seen_repo()
    document: dict[str, Any] = {"converts": []}
    for group, prefix in {"branches": "refs/heads/", "tags": "refs/tags/"}.items():
        document[group] = [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if ref.startswith(prefix)
        ]
    return JSONResponse(document)


def create_ref(call: Call) -> Response:
    """POST .../branch/NAME, and .../tag/REVISION with the tag's name in the body."""
    repo = call.seen_repo()
    call.owner(repo.id, repo.noun)
    document = call.json()
    if "branch" in call.parts:
        ref, start = f"refs/heads/{call.parts['branch']}", document.get("startingPoint")
    else:
        ref, start = f"refs/tags/{document.get('tag', '')}", call.parts["revision"]
    commit = call.commit(repo, start or "main")
    if ref in repo.refs:
        raise Refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit.sha
    call.store.save(repo)
    return JSONResponse({})


def card_text(store: Store, commit: Commit) -> str:
    """A commit's README.md; empty if it has none."""
    file = commit.files.get("README.md")
    return store.blobs.read(file.sha256).decode(errors="replace") if file else ""


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata between a card's ``---`` lines, as JSON values; empty where there is none.

    Raises:
        yaml.YAMLError: the block is no YAML mapping.
    """
    found = FRONT_MATTER.match(text)
    document = yaml.safe_load(found.group(1)) if found else None
    if not isinstance(document, dict | None):
        raise yaml.YAMLError("the metadata must be a mapping")
    metadata: dict[str, Any] = json.loads(json.dumps(document or {}, default=str))
    return metadata


def object_id(text: str) -> str:
    """24 hex digits, which the Hub uses as keys."""
    return short_digest(text.encode())[:24]
