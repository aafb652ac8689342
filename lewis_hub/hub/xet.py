"""Takes in what clients upload by Xet: huggingface_hub does so wherever hf_xet is installed.

The client cannot be told to use LFS instead (it asks for no transfer), but hf_xet can be told to
keep its chunks in a local folder: client and Hub share a file system here. When a commit names a
file that isn't stored yet, its chunks are looked up by SHA-256 in the shards of those folders and
hf_xet puts the file together again. Readers get plain files.

Shard format: https://huggingface.co/docs/xet/shard
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lewis_hub.files import sha256_of
from lewis_hub.hub.access import Refusal
from lewis_hub.hub.blobs import Blobs

STAGE = Path("xet", "xorbs")  # where hf_xet keeps shards and chunks below the folder it is given
ENTRY_BYTES = 48  # of every record in a shard, and of its header
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
TOKEN_S = 3600


@dataclass(frozen=True)
class UploadedFile:
    """A file that a shard describes, by its Xet hash."""

    sha256: str | None  # where the client told it
    xet_hash: str
    size_bytes: int


def new_upload(root: Path) -> str:
    """The address of a new folder, for the uploads of one commit."""
    if importlib.util.find_spec("hf_xet") is None:
        raise Refusal(501, "This Hub takes Xet uploads only with hf_xet: set HF_HUB_DISABLE_XET=1")
    folder = root.absolute() / "xet" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    return f"local://{folder}"


def take_in(root: Path, blobs: Blobs, sha256: str) -> int | None:
    """Store a file that was uploaded by Xet; returns its size, None if nobody uploaded it."""
    for shard in (root / "xet").glob(f"*/{STAGE}/shards/*.mdb"):
        for file in _files(shard.read_bytes()):
            if file.sha256 == sha256:
                target = blobs.path(sha256)
                target.parent.mkdir(parents=True, exist_ok=True)
                _rebuild(shard.parent.parent, file, target)
                return file.size_bytes
    return None


def join(root: Path, xet_hash: str, target: Path) -> bool:
    """Put a file together that is named by its Xet hash; False if nobody uploaded it."""
    for shard in (root / "xet").glob(f"*/{STAGE}/shards/*.mdb"):
        for file in _files(shard.read_bytes()):
            if file.xet_hash == xet_hash:
                target.parent.mkdir(parents=True, exist_ok=True)
                _rebuild(shard.parent.parent, file, target)
                return True
    return False


def sweep(root: Path, blobs: Blobs) -> None:
    """Remove the uploads of which every file is stored."""
    for folder in (root / "xet").glob("*"):
        shards = list(folder.glob(f"{STAGE}/shards/*.mdb"))
        files = [file for shard in shards for file in _files(shard.read_bytes())]
        digests = [file.sha256 for file in files if file.sha256]
        if digests and all(blobs.size_bytes(digest) is not None for digest in digests):
            shutil.rmtree(folder, ignore_errors=True)


def _files(shard: bytes) -> Iterator[UploadedFile]:
    """The files in a shard's first section: a header, its segments, and what the flags add."""
    offset = ENTRY_BYTES
    while shard[offset : offset + 32] not in (END_OF_FILES, b""):
        xet_hash = _hexadecimal(shard[offset : offset + 32])
        flags, n_segments = struct.unpack_from("<II", shard, offset + 32)
        offset += ENTRY_BYTES
        sizes = [
            struct.unpack_from("<I", shard, offset + n * ENTRY_BYTES + 36)[0]
            for n in range(n_segments)
        ]
        offset += n_segments * ENTRY_BYTES * (2 if flags & HAS_VERIFICATION else 1)
        sha256 = None
        if flags & HAS_SHA256:
            sha256 = _hexadecimal(shard[offset : offset + 32])
            offset += ENTRY_BYTES
        yield UploadedFile(sha256, xet_hash, sum(sizes))


def _hexadecimal(digest: bytes) -> str:
    """A shard's 32 bytes as Xet spells them: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _rebuild(stage: Path, file: UploadedFile, target: Path) -> None:
    """Let hf_xet join a file's chunks.

    The client may still hold the lock of its folder's index, so hf_xet works on a copy of that, and
    on links to the rest.
    """
    import hf_xet  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".xet-") as name:
        shutil.copytree(stage, Path(name) / STAGE, ignore=lambda *_: ("shards", "xorbs"))
        for kind in ("shards", "xorbs"):
            (Path(name) / STAGE / kind).mkdir(parents=True)
            for path in (stage / kind).iterdir():
                os.link(path, Path(name) / STAGE / kind / path.name)
        joined = Path(name) / "joined"
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{Path(name).absolute()}",
            token="local",
            token_expiry_unix_secs=int(time.time()) + TOKEN_S,
        )
        with group:
            wanted = hf_xet.XetFileInfo(file.xet_hash, file.size_bytes)
            group.start_download_file(wanted, str(joined))
        if file.sha256 and sha256_of(joined) != file.sha256:
            raise Refusal(400, "The uploaded chunks do not give the file that was promised")
        joined.replace(target)
