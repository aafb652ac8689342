"""Byte ranges of files that stay where they are, for looking into headers without a download."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from lewis_hub.errors import SourceError
from lewis_hub.hub.cache import snapshot_folder
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import persist

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import HfApi

    from lewis_hub.hub.source import Source


def read_range(api: HfApi, source: Source, path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, from disk where they are on disk.

    Raises:
        SourceError: the source has no such file, it is shorter, or it cannot be had.
    """
    file = source.file(path)
    if file is None or not 0 <= start <= stop <= file.size_bytes:
        found = f"has {file.size_bytes} bytes" if file else "does not exist"
        raise SourceError(
            source.pinned,
            f"bytes {start} to {stop} of `{path}` were wanted, but it {found}",
            "The file is cut short or its index is wrong: use an intact copy.",
        )
    if start == stop:
        return b""
    local = source.here or snapshot_folder(source.name, source.repo_type, source.commit_sha)
    if (local / path).exists():
        return _pread(local / path, start, stop)
    url = hf_hub_url(
        source.name,
        path,
        repo_type=source.repo_type,
        revision=source.commit_sha,
        endpoint=api.endpoint,
    )
    with hub_failures(Asked(api, source.name, source.repo_type, source.commit_sha)):
        return persist(lambda: _get(api, url, start, stop))


def _pread(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), stop - start, start)


def _get(api: HfApi, url: str, start: int, stop: int) -> bytes:
    """Read no further than `stop`, even where the server ignores ranges and sends all."""
    headers = {
        **build_hf_headers(token=api.token),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0
        wanted = skipped + stop - start
        received = bytearray()
        for piece in response.iter_bytes():
            received += piece
            if len(received) >= wanted:
                break
    if len(received) < wanted:
        raise ConnectionResetError("Consistency check failed: the range ended early")
    return bytes(received[skipped:wanted])
