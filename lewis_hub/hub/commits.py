"""Turns what a client sends into the embedded Hub's next commit."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lewis_hub.hub import xet
from lewis_hub.hub.access import Refusal
from lewis_hub.hub.blobs import git_oid
from lewis_hub.hub.store import Commit, File, Repo, Store, lfs_file, now

SHA256 = re.compile(r"[0-9a-f]{64}")
REGULAR_LIMIT_BYTES = 10 * 2**20
LFS_SUFFIXES = (
    "7z arrow avro bin bz2 ckpt ftz gguf gz h5 joblib lz4 mds mlmodel model msgpack npy npz onnx "
    "ot parquet pb pickle pkl pt pth rar safetensors tar tflite tgz wasm xz zip zst"
)
NEW_REPO_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()
)


@dataclass(frozen=True)
class Proposal:
    """What a client wants committed: title, description, guard, and the files it would leave."""

    title: str
    message: str
    parent: str | None
    files: Mapping[str, File]


def goes_to_lfs(path: str, size_bytes: int, sample: bytes, attributes: str) -> bool:
    """Whether a file is stored as LFS: by .gitattributes, by size, or because it is binary."""
    if size_bytes == 0:
        return False
    if size_bytes > REGULAR_LIMIT_BYTES or b"\0" in sample:
        return True
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    name = PurePosixPath(path).name
    return any(fnmatch.fnmatchcase(path if "/" in p else name, p) for p in patterns)


def attributes_of(store: Store, commit: Commit) -> str:
    """The text of a commit's .gitattributes."""
    file = commit.files.get(".gitattributes")
    return store.blobs.read(file.sha256).decode(errors="replace") if file else ""


def first_commit(store: Store, repo: Repo, author: str) -> Commit:
    """Give a new repository its branch main, with the .gitattributes that the Hub writes."""
    content = NEW_REPO_ATTRIBUTES.encode()
    attributes = File(store.blobs.add(content), len(content), git_oid(content), lfs=False)
    files = {".gitattributes": attributes}
    commit = Commit("", (), author, now(), "initial commit", "", files)
    return store.add_commit(repo, commit, "refs/heads/main")


def read_proposal(store: Store, base: Commit, body: bytes) -> Proposal:
    """Apply the lines of a commit request, in order, to a commit's files.

    Raises:
        Refusal: a line that is no JSON or names an unsafe path, a deletion of what isn't there, or
            an LFS file that was not uploaded.
    """
    header: dict[str, Any] = {}
    files = dict(base.files)
    for key, value in _lines(body):
        if key == "header":
            header = value
        elif key == "file":
            _put(files, check_path(value["path"]), _regular(store, base, value))
        elif key == "lfsFile":
            _put(files, check_path(value["path"]), _uploaded(store, value))
        elif key in ("deletedFile", "deletedFolder"):
            _delete(files, key, value["path"])
        elif key == "copyFile":
            _put(files, check_path(value["path"]), _copied(base, value))
        else:
            raise Refusal(400, f"Unknown commit operation: {key}")
    title = str(header.get("summary", "")).strip()
    if not title:
        raise Refusal(400, "A commit needs a header line with a summary")
    parent = header.get("parentCommit")
    return Proposal(title, str(header.get("description") or ""), parent, files)


def check_path(path: str) -> str:
    """Refuse a path that is absolute, leaves the repository or git could not hold."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or not path.isprintable():
        raise Refusal(400, f"Invalid path in repository: {path!r}")
    return path


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in body.splitlines():
        if line.strip():
            try:
                item = json.loads(line)
                yield item["key"], item["value"]
            except (ValueError, KeyError, TypeError):
                raise Refusal(400, "A commit is lines of JSON with a key and a value") from None


def _put(files: dict[str, File], path: str, file: File) -> None:
    """Set a file; one cannot lie where a folder is, or below another file."""
    above = [str(parent) for parent in PurePosixPath(path).parents][:-1]
    clash = [name for name in above if name in files]
    clash += [name for name in files if name.startswith(path + "/")]
    if clash:
        raise Refusal(400, f"{path} and {clash[0]} cannot both be files")
    files[path] = file


def _regular(store: Store, base: Commit, value: Mapping[str, Any]) -> File:
    content = value.get("content", "")
    try:
        raw = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
    except binascii.Error:
        raise Refusal(400, f"{value['path']}: content is not base64") from None
    if goes_to_lfs(value["path"], len(raw), raw[:512], attributes_of(store, base)):
        return lfs_file(store.blobs.add(raw), len(raw))
    return File(store.blobs.add(raw), len(raw), git_oid(raw), lfs=False)


def _uploaded(store: Store, value: Mapping[str, Any]) -> File:
    oid = value.get("oid")
    if not (isinstance(oid, str) and SHA256.fullmatch(oid)):
        raise Refusal(400, f"{value['path']}: oid must be a SHA-256")
    size_bytes = store.blobs.size_bytes(oid)
    if size_bytes is None:
        size_bytes = xet.take_in(store.root, store.blobs, oid)
    if size_bytes is None or size_bytes != value.get("size", size_bytes):
        raise Refusal(
            400,
            "Your push was rejected because an LFS pointer pointed to a file that does not exist: "
            f"{value['path']}",
        )
    return lfs_file(oid, size_bytes)


def _copied(base: Commit, value: Mapping[str, Any]) -> File:
    source = base.files.get(value["srcPath"])
    if source is None:
        raise Refusal(404, f"{value['srcPath']} does not exist", "EntryNotFound")
    return source


def _delete(files: dict[str, File], key: str, path: str) -> None:
    path = path.rstrip("/")
    if key == "deletedFile":
        gone = [path] if path in files else []
    else:
        gone = [name for name in files if name.startswith(path + "/")]
    if not gone:
        noun = "file" if key == "deletedFile" else "folder"
        raise Refusal(404, f"A {noun} with this name doesn't exist: {path}", "EntryNotFound")
    for name in gone:
        del files[name]
