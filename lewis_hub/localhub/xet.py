"""Accepts what clients upload by Xet, which huggingface_hub does wherever hf_xet is installed.

The client has no fallback to LFS, and buckets take uploads by Xet only. But hf_xet can keep its
chunks in a local folder, and client and Hub share a file system here. When a request names a file
that is not stored yet, its Xet hash is looked up in the shards of those folders, and hf_xet joins
its chunks.

Shard format: https://huggingface.co/docs/xet/shard
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lewis_hub.localhub.access import Refusal
from lewis_hub.localhub.store import Blobs, replacing

SHARDS = "xet/xorbs/shards/*.mdb"  # below the folder that hf_xet is given
ENTRY_BYTES = 48  # of every record of a shard, and of its header
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
TOKEN_S = 3600


def new_upload(root: Path) -> dict[str, Any]:
    """A new folder for the uploads of one client, as the answer to its request for a token."""
    if importlib.util.find_spec("hf_xet") is None:
        raise Refusal(501, "This Hub takes Xet uploads only with hf_xet: set HF_HUB_DISABLE_XET=1")
    folder = root.absolute() / "xet" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    return {"casUrl": f"local://{folder}", "accessToken": "local", "exp": _expiry()}


def take_in(root: Path, digest: str, target: Path) -> bool:
    """Write an uploaded file, named by its SHA-256 or Xet hash; False if nobody uploaded it."""
    for upload in (root / "xet").glob("*"):
        for sha256, xet_hash in _files(upload):
            if digest in (sha256, xet_hash):
                _join(upload, sha256, xet_hash, target)
                return True
    return False


def remove_stored(root: Path, blobs: Blobs) -> None:
    """Remove the uploads whose files are all stored."""
    for upload in (root / "xet").glob("*"):
        digests = [sha256 for sha256, _ in _files(upload) if sha256]
        if digests and all(blobs.path(digest).exists() for digest in digests):
            shutil.rmtree(upload, ignore_errors=True)


def _files(upload: Path) -> Iterator[tuple[str | None, str]]:
    """SHA-256, where the client sent it, and Xet hash of each file in the first shard section."""
    for shard in (path.read_bytes() for path in upload.glob(SHARDS)):
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
                raise Refusal(400, f"The chunks have SHA-256 {digest.hexdigest()}, not {sha256}")


def _link_data(source: str, target: str) -> None:
    """Link the files of ``xet/xorbs/xorbs`` and ``shards``; copy the index, which is locked."""
    is_data = Path(source).parent.parent.name == "xorbs"
    (os.link if is_data else shutil.copy)(source, target)


def _expiry() -> int:
    return int(time.time()) + TOKEN_S
