"""One large file by HTTP: goes on from the bytes that arrived, even in a later run.

huggingface_hub 2 starts an interrupted file again. The finished file lies where its cache keeps
blobs, under its sha256, and counts only once its bytes have been checked against that.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_session
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from lewis_hub.files import sha256_of
from lewis_hub.hub.retries import complete

if TYPE_CHECKING:
    from lewis_hub.hub.failures import Asked
    from lewis_hub.hub.source import SourceFile
    from lewis_hub.progress import Advance

PIECE_BYTES = 1 << 20


def partial_file(blob: Path) -> Path:
    """Where the bytes of a blob gather until they are complete."""
    return blob.with_name(f"{blob.name}.partial")


def download_blob(
    asked: Asked, url: str, file: SourceFile, blob: Path, advance: Advance, stop: threading.Event
) -> None:
    """Bring `url` to `blob`; returns early, the part kept, when `stop` is set.

    Raises:
        SourceError: what came is not what the Hub lists, twice over.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(constants.HF_HUB_CACHE)
    lock = cache / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"  # huggingface_hub's
    lock.parent.mkdir(parents=True, exist_ok=True)
    part = partial_file(blob)
    with WeakFileLock(lock):
        for _ in range(2):
            if blob.exists() or stop.is_set():
                return
            complete(lambda: _append(asked, url, file, blob, advance, stop), lambda: _size(part))
            if stop.is_set():
                return
            if f"sha256:{sha256_of(part)}" == file.digest:
                part.rename(blob)
                return
            part.unlink()
    raise asked.failed(
        f"`{file.path}` arrived with other bytes than {asked.api.endpoint} lists",
        "Try again; if it stays so, a proxy on the way or the repo itself is broken.",
    )


def _append(
    asked: Asked, url: str, file: SourceFile, blob: Path, advance: Advance, stop: threading.Event
) -> None:
    part = partial_file(blob)
    start = _size(part)
    if start >= file.size_bytes:
        part.touch()
        return
    headers = {
        **build_hf_headers(token=asked.api.token),
        "Range": f"bytes={start}-",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        whole = response.status_code == 200  # the server did not understand the range
        with part.open("wb" if whole else "ab") as out:
            for piece in response.iter_bytes(PIECE_BYTES):
                out.write(piece)
                advance(len(piece))
                if stop.is_set():
                    return
    if part.stat().st_size < file.size_bytes:
        raise ConnectionResetError("Consistency check failed: the file ended early")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
