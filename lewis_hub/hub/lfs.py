"""Large files on the embedded Hub: the LFS batch, uploads whole or in parts, and their bytes."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from lewis_hub.hub.access import Refusal
from lewis_hub.hub.blobs import replacing
from lewis_hub.hub.call import Call
from lewis_hub.hub.contents import FILE_HEADERS, media_type

SHA256 = re.compile(r"[0-9a-f]{64}")
JOIN_BYTES = 8 * 2**20


def batch(call: Call) -> Response:
    """POST .git/info/lfs/objects/batch: where to put each object that isn't stored yet."""
    repo = call.seen_repo()
    asked = call.json()
    ref = (asked.get("ref") or {}).get("name", "main")
    if asked.get("operation") != "upload":
        raise Refusal(422, "This Hub's batch is for uploads; files are read by resolve")
    if ref.startswith("refs/pr/") or call.grant is None or not call.grant.owns(repo.id):
        call.proposer()
    else:
        call.writer(repo)
    home = f"{call.endpoint}{call.request.url.path.removesuffix('/batch')}"
    objects = [_instructions(call, home, item) for item in asked.get("objects", [])]
    in_parts = any(item["size"] > call.hub.part_bytes for item in objects)
    transfer = "multipart" if in_parts else "basic"
    return JSONResponse({"transfer": transfer, "objects": objects})


def _instructions(call: Call, home: str, item: dict[str, Any]) -> dict[str, Any]:
    oid, size_bytes = str(item.get("oid")), int(item.get("size", -1))
    answer: dict[str, Any] = {"oid": oid, "size": size_bytes}
    if not SHA256.fullmatch(oid) or size_bytes < 0:
        return {**answer, "error": {"code": 422, "message": "invalid oid or size"}}
    if call.store.blobs.size_bytes(oid) == size_bytes:
        return answer
    part_bytes = call.hub.part_bytes
    upload: dict[str, Any] = {"href": call.hub.upload_url(oid)}
    if size_bytes > part_bytes:
        n_parts = -(-size_bytes // part_bytes)
        urls = {str(n): call.hub.upload_url(oid, n) for n in range(1, n_parts + 1)}
        completion = f"{call.hub.upload_url(oid)}&size={size_bytes}"
        upload = {"href": completion, "header": {"chunk_size": str(part_bytes), **urls}}
    verify = {"href": f"{home}/verify"}
    return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def verify(call: Call) -> Response:
    """POST .../objects/verify: is the object there, whole?"""
    asked = call.json()
    if call.store.blobs.size_bytes(str(asked.get("oid"))) != asked.get("size"):
        raise Refusal(404, "Object not found, or of another size")
    return JSONResponse({})


async def put(request: Request) -> Response:
    """PUT /lfs-upload/OID[/PART]: bytes by an address that the batch gave out."""
    hub, oid, part = _allowed(request)
    target = hub.store.blobs.path(oid) if part is None else _part(hub.store.root, oid, part)
    digest = hashlib.sha256()
    with replacing(target) as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
        if part is None and digest.hexdigest() != oid:
            raise Refusal(400, f"The bytes sent have SHA-256 {digest.hexdigest()}, not {oid}")
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


async def complete(request: Request) -> Response:
    """POST /lfs-upload/OID: join the parts."""
    hub, oid, _ = _allowed(request)
    asked = await request.json()
    numbers = [int(part["partNumber"]) for part in asked.get("parts", [])]
    await run_in_threadpool(_join, hub.store.root, hub.store.blobs.path(oid), oid, numbers)
    return JSONResponse({"success": True})


def _join(root: Path, target: Path, oid: str, numbers: list[int]) -> None:
    digest = hashlib.sha256()
    try:
        with replacing(target) as whole:
            for number in numbers:
                with _part(root, oid, number).open("rb") as part:
                    while chunk := part.read(JOIN_BYTES):
                        digest.update(chunk)
                        whole.write(chunk)
            if digest.hexdigest() != oid:
                raise Refusal(400, f"The parts have SHA-256 {digest.hexdigest()}, not {oid}")
    except FileNotFoundError:
        raise Refusal(400, "A part is missing") from None
    shutil.rmtree(root / "uploads" / oid, ignore_errors=True)


def stored(request: Request) -> Response:
    """GET /lfs/OID/NAME: a stored object, Range included."""
    hub = request.app.state.hub
    oid, name = request.path_params["oid"], request.path_params["filename"]
    if not hub.signed(oid, request.query_params.get("signature", "")):
        raise Refusal(403, "This address is not signed by this Hub")
    headers = {**FILE_HEADERS, "ETag": f'"{oid}"'}
    return FileResponse(hub.store.blobs.path(oid), headers=headers, media_type=media_type(name))


def _allowed(request: Request) -> tuple[Any, str, int | None]:
    """The Hub, the object and the part, if the address is one that it gave out."""
    hub, oid = request.app.state.hub, request.path_params["oid"]
    if not hub.signed(f"upload {oid}", request.query_params.get("signature", "")):
        raise Refusal(403, "This address is not signed by this Hub")
    part = request.path_params.get("part")
    return hub, oid, int(part) if part is not None else None


def _part(root: Path, oid: str, number: int) -> Path:
    return root / "uploads" / oid / str(number)
