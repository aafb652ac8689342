"""Contents of files on the embedded Hub: downloads, and uploads by LFS and by Xet.

Clients upload by Xet wherever hf_xet is installed. It can keep its chunks in a local folder, which
this Hub reads too: a file's Xet hash is looked up in the folder's shards, and hf_xet joins its
chunks.

Shard format: https://huggingface.co/docs/xet/shard
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.util
import mimetypes
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import Field, NonNegativeInt, TypeAdapter
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from lewis_hub.localhub.call import Call, parsed, refusal
from lewis_hub.localhub.hub import Grant, Hub
from lewis_hub.localhub.store import SHA256, Store, object_id, replacing

TEXT = "text/plain; charset=utf-8"
FILE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
SHARDS = "xet/xorbs/shards/*.mdb"  # below the folder that hf_xet is given
ENTRY_BYTES = 48  # of every record of a shard, and of its header
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
TOKEN_S = 3600


@dataclass(frozen=True)
class LfsObject:
    """A large file, as clients name it."""

    oid: str
    size: NonNegativeInt


@dataclass(frozen=True)
class LfsObjects:
    """The body of a batch."""

    objects: Annotated[list[LfsObject], Field(fail_fast=True)]


LFS_OBJECT, LFS_OBJECTS = TypeAdapter(LfsObject), TypeAdapter(LfsObjects)


def resolve(call: Call) -> Response:
    """GET .../resolve/REVISION/PATH: the file, or a redirect to the bytes of an LFS file."""
    commit = call.commit(call.read_repo())
    path = call.parts["path"]
    file = commit.files.get(path)
    if file is None:
        raise refusal(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.sha}
    if not file.lfs:
        headers |= FILE_HEADERS | {"ETag": f'"{file.oid}"'}
        stored = call.store.blobs.path(file.sha256)
        return FileResponse(stored, headers=headers, media_type=_media_type(path, TEXT))
    headers |= {"X-Linked-Size": str(file.size_bytes), "X-Linked-Etag": f'"{file.sha256}"'}
    name = quote(PurePosixPath(path).name, safe="")
    return RedirectResponse(_signed(call.hub, f"/lfs/{file.sha256}", f"/{name}"), 302, headers)


def _media_type(path: str, otherwise: str) -> str:
    """The type of an image; `otherwise` for any other file, so that no browser runs it."""
    guessed = mimetypes.guess_type(path)[0] or ""
    return guessed if guessed.startswith("image/") else otherwise


def _signed(hub: Hub, path: str, name: str = "") -> str:
    """An address of the storage, for somebody who may read, or upload, the file."""
    return f"{hub.storage_url}{path}{name}?signature={_signature(hub, path)}"


def _signature(hub: Hub, path: str) -> str:
    return hmac.digest(hub.signing_key, path.encode(), "sha256").hex()


def _require_signed(request: Request, path: str) -> None:
    """Refuse an address that the Hub did not give out."""
    signature = request.query_params.get("signature", "")
    expected = _signature(request.app.state.hub, path)
    if not hmac.compare_digest(signature.encode(), expected.encode()):
        raise refusal(403, "The signature of this address is missing or not valid")


def lfs_batch(call: Call) -> dict[str, Any]:
    """POST .git/info/lfs/objects/batch: where to upload each object that is not stored yet.

    Anyone with a write token may upload, since a pull request may name the objects.
    """
    call.seen_repo()
    call.writer()
    verify = {"href": str(call.request.url).replace("/objects/batch", "/objects/verify")}
    objects = []
    for item in parsed(LFS_OBJECTS, call.body).objects:
        oid, size_bytes = item.oid, item.size
        answer: dict[str, Any] = {"oid": oid, "size": size_bytes}
        if not SHA256.fullmatch(oid):
            answer["error"] = {"code": 422, "message": "invalid oid"}
        elif call.store.blobs.size_bytes(oid) != size_bytes:
            upload = {"href": _signed(call.hub, f"/lfs-upload/{oid}")}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


def lfs_verify(call: Call) -> dict[str, Any]:
    """POST .../objects/verify: is an object stored with its size? For those who may upload."""
    call.seen_repo()
    call.writer()
    asked = parsed(LFS_OBJECT, call.body)
    is_oid = SHA256.fullmatch(asked.oid)
    if not is_oid or call.store.blobs.size_bytes(asked.oid) != asked.size:
        raise refusal(404, "Object not found, or of another size")
    return {}


async def lfs_upload(request: Request) -> Response:
    """PUT /lfs-upload/OID: an object's bytes; the address has to be signed by `lfs_batch`."""
    digest, oid = hashlib.sha256(), _object_id(request)
    _require_signed(request, f"/lfs-upload/{oid}")
    with replacing(request.app.state.hub.store.blobs.path(oid)) as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != oid:
            raise refusal(400, f"The bytes sent have SHA-256 {digest.hexdigest()}, not {oid}")
    return Response()


def lfs_download(request: Request) -> Response:
    """GET /lfs/OID/NAME: an object, Range included; the address has to be signed by `resolve`."""
    oid = _object_id(request)
    stored = request.app.state.hub.store.blobs.path(oid)
    if not stored.exists():
        raise refusal(404, "Object not found")
    _require_signed(request, f"/lfs/{oid}")
    headers = {**FILE_HEADERS, "ETag": f'"{oid}"'}
    media = _media_type(request.path_params["name"], "application/octet-stream")
    return FileResponse(stored, headers=headers, media_type=media)


def _object_id(request: Request) -> str:
    oid: str = request.path_params["oid"]
    if not SHA256.fullmatch(oid):
        raise refusal(404, "Object not found")
    return oid


def xet_token(store: Store, grant: Grant) -> dict[str, Any]:
    """A new folder for the uploads of a user, as the answer to a request for a Xet token."""
    if importlib.util.find_spec("hf_xet") is None:
        raise refusal(501, "This Hub takes Xet uploads only with hf_xet: set HF_HUB_DISABLE_XET=1")
    folder = store.root.absolute() / "xet" / f"{object_id(grant.user)}-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    return {"casUrl": f"local://{folder}", "accessToken": "local", "exp": _expiry()}


def take_xet_upload(store: Store, grant: Grant, digest: str, target: Path) -> bool:
    """Write a file that a user uploaded, by its SHA-256 or Xet hash; False if there is none."""
    for upload in (store.root / "xet").glob(f"{object_id(grant.user)}-*"):
        for sha256, xet_hash in _files(upload):
            if digest in (sha256, xet_hash):
                _join(upload, sha256, xet_hash, target)
                return True
    return False


def remove_stored_uploads(store: Store) -> None:
    """Remove the uploads whose files are all stored."""
    for upload in (store.root / "xet").glob("*"):
        digests = [sha256 for sha256, _ in _files(upload) if sha256]
        if digests and all(store.blobs.path(digest).exists() for digest in digests):
            shutil.rmtree(upload, ignore_errors=True)


def _files(upload: Path) -> Iterator[tuple[str | None, str]]:
    """SHA-256, where the client sent it, and Xet hash of each file in the first shard section."""
    for path in upload.glob(SHARDS):
        with contextlib.suppress(OSError, struct.error):  # no shard: its client wrote another file
            yield from _files_of(path.read_bytes())


def _files_of(shard: bytes) -> Iterator[tuple[str | None, str]]:
    offset = ENTRY_BYTES
    while shard[offset : offset + 32] not in (END_OF_FILES, b""):
        xet_hash = _hexadecimal(shard, offset)
        flags, n_segments = struct.unpack_from("<II", shard, offset + 32)
        n_records = 1 + n_segments * (2 if flags & HAS_VERIFICATION else 1)
        offset += n_records * ENTRY_BYTES
        sha256 = None
        if flags & HAS_SHA256:
            sha256 = _hexadecimal(shard, offset)
            offset += ENTRY_BYTES
        yield sha256, xet_hash


def _hexadecimal(shard: bytes, offset: int) -> str:
    """32 bytes as Xet spells them: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, offset))


def _join(upload: Path, sha256: str | None, xet_hash: str, target: Path) -> None:
    """Let hf_xet join a file's chunks, from a copy since the client may still lock its folder."""
    import hf_xet  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(dir=upload.parent.parent, prefix=".xet-") as copy:
        shutil.copytree(upload, copy, copy_function=_link_data, dirs_exist_ok=True)
        group = hf_xet.XetSession().new_download_stream_group(
            endpoint=f"local://{copy}", token="local", token_expiry_unix_secs=_expiry()
        )
        digest = hashlib.sha256()
        with replacing(target) as file:
            for chunk in group.download_stream(hf_xet.XetFileInfo(xet_hash)):
                digest.update(chunk)
                file.write(chunk)
            if sha256 not in (None, digest.hexdigest()):
                raise refusal(400, f"The chunks have SHA-256 {digest.hexdigest()}, not {sha256}")


def _link_data(source: str, target: str) -> None:
    """Link the files of ``xet/xorbs/xorbs`` and ``shards``; copy the index, which is locked."""
    is_data = Path(source).parent.parent.name == "xorbs"
    (os.link if is_data else shutil.copy)(source, target)


def _expiry() -> int:
    return int(time.time()) + TOKEN_S
