"""Files on the embedded Hub: trees, downloads, and the LFS uploads of large files."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from lewis_hub.localhub.access import Refusal
from lewis_hub.localhub.call import Call
from lewis_hub.localhub.store import SHA256, File, lfs_pointer, replacing, short_digest

TEXT = "text/plain; charset=utf-8"
FILE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


def tree(call: Call) -> Response:
    """GET .../tree/REVISION[/FOLDER]."""
    files = call.commit(call.seen_repo()).files
    folder = call.parts.get("path", "").strip("/")
    below = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in files if path.startswith(below)):
        parts = path.removeprefix(below).split("/")
        folders = [below + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        for name in folders if call.flag("recursive") else folders[:1]:
            entries[name] = _folder_entry(name, files)
        if call.flag("recursive") or not folders:
            entries[path] = _file_entry(path, files[path])
    if folder and not entries:
        problem = f'{folder} does not exist on "{call.parts["revision"]}"'
        raise Refusal(404, problem, "EntryNotFound")
    return JSONResponse(list(entries.values()))


def paths_info(call: Call) -> Response:
    """POST .../paths-info/REVISION: the entries of those paths that exist."""
    files = call.commit(call.seen_repo()).files
    entries = []
    for path in parse_qs(call.body.decode()).get("paths", []):
        if path in files:
            entries.append(_file_entry(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            entries.append(_folder_entry(path, files))
    return JSONResponse(entries)


def _file_entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "oid": file.oid, "size": file.size_bytes, "path": path}
    return entry | ({"lfs": {"oid": file.sha256, **lfs_sizes(file)}} if file.lfs else {})


def _folder_entry(path: str, files: Mapping[str, File]) -> dict[str, Any]:
    """A folder; its oid is a digest of all files below it."""
    below = [f"{name} {file.oid}" for name, file in files.items() if name.startswith(f"{path}/")]
    oid = short_digest("\n".join(sorted(below)).encode())
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def lfs_sizes(file: File) -> dict[str, int]:
    """The sizes of an LFS file and its pointer, as the Hub's clients expect them."""
    pointer = lfs_pointer(file.sha256, file.size_bytes)
    return {"size": file.size_bytes, "pointerSize": len(pointer)}


def resolve(call: Call) -> Response:
    """GET .../resolve/REVISION/PATH: the file, or a redirect to the bytes of an LFS file."""
    repo = call.read_repo()
    commit = call.commit(repo)
    path = call.parts["path"]
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.sha}
    if not file.lfs:
        headers |= FILE_HEADERS | {"ETag": f'"{file.oid}"'}
        stored = call.store.blobs.path(file.sha256)
        return FileResponse(stored, headers=headers, media_type=media_type(path, TEXT))
    headers |= {"X-Linked-Size": str(file.size_bytes), "X-Linked-Etag": f'"{file.sha256}"'}
    name = quote(PurePosixPath(path).name, safe="")
    return RedirectResponse(f"{call.hub.storage_url}/lfs/{file.sha256}/{name}", 302, headers)


def media_type(path: str, otherwise: str) -> str:
    """The type of an image; `otherwise` for any other file, so that no browser runs it."""
    guessed = mimetypes.guess_type(path)[0] or ""
    return guessed if guessed.startswith("image/") else otherwise


def lfs_batch(call: Call) -> Response:
    """POST .git/info/lfs/objects/batch: where to upload each object that is not stored yet.

    Anyone with a write token may upload, since a pull request may name the objects.
    """
    call.seen_repo()
    call.writer()
    verify = {"href": str(call.request.url).replace("/objects/batch", "/objects/verify")}
    objects = []
    for item in call.json().get("objects", []):
        oid, size_bytes = str(item.get("oid")), item.get("size")
        answer: dict[str, Any] = {"oid": oid, "size": size_bytes}
        if not SHA256.fullmatch(oid):
            answer["error"] = {"code": 422, "message": "invalid oid"}
        elif call.store.blobs.size_bytes(oid) != size_bytes:
            upload = {"href": f"{call.hub.storage_url}/lfs-upload/{oid}"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects})


def lfs_verify(call: Call) -> Response:
    """POST .../objects/verify: is the object stored with its full size?"""
    document = call.json()
    if call.store.blobs.size_bytes(str(document.get("oid"))) != document.get("size"):
        raise Refusal(404, "Object not found, or of another size")
    return JSONResponse({})


async def lfs_upload(request: Request) -> Response:
    """PUT /lfs-upload/OID: an object's bytes; they need no token, since they have to match OID."""
    digest, oid = hashlib.sha256(), _object_id(request)
    with replacing(request.app.state.hub.store.blobs.path(oid)) as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != oid:
            raise Refusal(400, f"The bytes sent have SHA-256 {digest.hexdigest()}, not {oid}")
    return Response()


def lfs_download(request: Request) -> Response:
    """GET /lfs/OID/NAME: an object, Range included; only who may read its repository knows OID."""
    oid = _object_id(request)
    stored = request.app.state.hub.store.blobs.path(oid)
    if not stored.exists():
        raise Refusal(404, "Object not found")
    headers = {**FILE_HEADERS, "ETag": f'"{oid}"'}
    media = media_type(request.path_params["name"], "application/octet-stream")
    return FileResponse(stored, headers=headers, media_type=media)


def _object_id(request: Request) -> str:
    oid: str = request.path_params["oid"]
    if not SHA256.fullmatch(oid):
        raise Refusal(404, "Object not found")
    return oid
