"""The JSON in which the embedded Hub describes repositories, files and commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lewis_hub.hub.access import Grant
from lewis_hub.hub.blobs import lfs_pointer
from lewis_hub.hub.card import card_metadata, card_text, tags
from lewis_hub.hub.store import Commit, File, Repo, Store

PIPELINE_FIELDS = ("pipeline_tag", "library_name")


def user_info(grant: Grant) -> dict[str, Any]:
    """The answer to whoami-v2; who may write everywhere is shown in an organisation `*`."""
    organisations = [name for name in grant.namespaces if name != grant.user]
    return {
        "type": "user",
        "id": object_id(grant.user),
        "name": grant.user,
        "fullname": grant.user,
        "isPro": False,
        "canPay": False,
        "orgs": [
            {"type": "org", "id": object_id(name), "name": name, "fullname": name}
            for name in organisations
        ],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": f"{grant.role} token", "role": grant.role},
        },
    }


def repo_info(store: Store, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    """A repository at a commit; with `blobs`, each file's size and digests too."""
    try:
        metadata = card_metadata(card_text(store, commit))
    except yaml.YAMLError:
        metadata = {}
    described: dict[str, Any] = {
        "_id": object_id(f"{repo.kind}/{repo.id}"),
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": repo.created_at,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags(metadata, commit),
        "cardData": metadata,
        "siblings": [
            {"rfilename": path, **(_sizes(file) if blobs else {})}
            for path, file in sorted(commit.files.items())
        ],
        "usedStorage": sum({f.sha256: f.size_bytes for f in commit.files.values()}.values()),
    }
    if repo.kind == "models":
        described["modelId"] = repo.id
        described["spaces"] = []
        described |= {name: metadata[name] for name in PIPELINE_FIELDS if name in metadata}
    return described


def _sizes(file: File) -> dict[str, Any]:
    sizes: dict[str, Any] = {"size": file.size_bytes, "blobId": file.oid}
    if file.lfs:
        pointer = lfs_pointer(file.sha256, file.size_bytes)
        sizes["lfs"] = {
            "sha256": file.sha256,
            "size": file.size_bytes,
            "pointerSize": len(pointer),
        }
    return sizes


def file_entry(path: str, file: File) -> dict[str, Any]:
    """A file as tree and paths-info give it."""
    entry: dict[str, Any] = {
        "type": "file",
        "oid": file.oid,
        "size": file.size_bytes,
        "path": path,
    }
    if file.lfs:
        pointer = lfs_pointer(file.sha256, file.size_bytes)
        entry["lfs"] = {
            "oid": file.sha256,
            "size": file.size_bytes,
            "pointerSize": len(pointer),
        }
    return entry


def folder_entry(path: str, files: Mapping[str, File]) -> dict[str, Any]:
    """A folder as tree and paths-info give it; its oid stands for all that lies below."""
    below = [f"{name} {file.oid}" for name, file in sorted(files.items()) if is_below(name, path)]
    return {"type": "directory", "oid": short_digest("\n".join(below)), "size": 0, "path": path}


def is_below(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, at any depth; "" is the repository."""
    return not folder or path.startswith(folder + "/")


def tree(files: Mapping[str, File], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, folders included; empty where there is no such folder."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(name for name in files if is_below(name, folder)):
        parts = path.removeprefix(folder + "/" if folder else "").split("/")
        for depth in range(1, len(parts)):
            name = "/".join(([folder] if folder else []) + parts[:depth])
            if name not in entries and (recursive or depth == 1):
                entries[name] = folder_entry(name, files)
        if recursive or len(parts) == 1:
            entries[path] = file_entry(path, files[path])
    return list(entries.values())


def with_last_commits(
    entries: list[dict[str, Any]], history: Iterator[Commit]
) -> list[dict[str, Any]]:
    """Add to each entry the newest commit that changed it."""
    commits = list(history)
    for entry in entries:
        last = commits[0]
        state = _state(last, entry["path"])
        for commit in commits[1:]:
            if _state(commit, entry["path"]) != state:
                break
            last = commit
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entries


def _state(commit: Commit, path: str) -> list[tuple[str, str]]:
    """All that a commit holds at and below a path."""
    return [(n, f.oid) for n, f in commit.files.items() if n == path or is_below(n, path)]


def commit_entry(commit: Commit) -> dict[str, Any]:
    """A commit as the list of commits gives it."""
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": commit.date,
    }


def short_digest(text: str) -> str:
    """40 hex digits that stand for a text."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def object_id(text: str) -> str:
    """24 hex digits in the place of a database's key."""
    return short_digest(text)[:24]
