"""Byte ranges of the files of a pinned source: requested, checked and compared.

A merge that streams stores no file of its sources. Whole files are downloaded by ranges, too, so
that they resume.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from lewis_hub.display import Advance
from lewis_hub.errors import SourceError
from lewis_hub.files import require_inside
from lewis_hub.hub.failures import HubRepo, call_hub, hub_failures, retry_transfer
from lewis_hub.hub.source import Source, SourceFile, local_reading

CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
OUTDATED = frozenset({401, 403, 404, 410})  # a signed address has expired
MAX_READ = 1000
# digest of a file -> beginning, end and digest of what was read of it alone
READ: dict[str, set[tuple[int, int, bytes]]] = {}
MIN_TRANSFER_BYTES = 1 << 16  # of several attempts in a row: fewer would take days


@dataclass
class ByteCounter:
    """Counts and reports the bytes that several threads receive, and never more than `total`."""

    total: int = sys.maxsize
    report: Advance = lambda _: None
    n_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, n_bytes: int) -> None:
        """Add to the number."""
        with self.lock:
            n_bytes = min(n_bytes, self.total - self.n_bytes)
            if n_bytes > 0:
                self.n_bytes += n_bytes
                self.report(n_bytes)


def request_range(
    url: str, start: int, stop: int | None = None, *, token: str | bool | None
) -> AbstractContextManager[httpx2.Response]:
    """Request the bytes [start, stop) of a file; the server may send others."""
    headers = {
        **build_hf_headers(token=token),
        "Range": f"bytes={start}-{'' if stop is None else stop - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return get_session().stream("GET", url, headers=headers, timeout=timeout)


def pieces_of(found: httpx2.Response, start: int, stop: int, size_bytes: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file from an answer that may be wrong, too long or too slow.

    Raises:
        HfHubHTTPError: the answer is an error.
        RemoteProtocolError: it has other bytes or ends early; here, or in the iteration.
    """
    hf_raise_for_status(found)
    content_range = found.headers.get("Content-Range", "")
    numbers = CONTENT_RANGE.fullmatch(content_range)
    expected_bytes = stop - start if found.status_code == 206 else size_bytes
    told_bytes = found.headers.get("Content-Length", str(expected_bytes))
    if found.status_code == 206 and (
        numbers is None or tuple(map(int, numbers.groups())) != (start, stop - 1, size_bytes)
    ):
        problem = (
            f"bytes {start}-{stop - 1}/{size_bytes} were requested, {content_range[:100]!r} came"
        )
    elif found.status_code not in {200, 206} or told_bytes != str(expected_bytes):
        kind = found.headers.get("Content-Type", "an answer")
        problem = f"{kind} of {told_bytes} bytes came in place of {expected_bytes} bytes"
    else:
        n_before = 0 if found.status_code == 206 else start  # 200: the server ignored the range
        return _only(found.iter_raw(), n_before, stop - start)
    raise httpx2.RemoteProtocolError(problem)


def _only(pieces: Iterator[bytes], n_before: int, n_bytes: int) -> Iterator[bytes]:
    """The `n_bytes` behind the first `n_before`; of further ones at most a piece is received."""
    left = n_bytes
    for piece in pieces:
        if not left:
            return
        wanted = piece[n_before:][:left]
        n_before -= min(n_before, len(piece))
        left -= len(wanted)
        if wanted:
            yield wanted
    if left:
        raise httpx2.RemoteProtocolError("the answer ended early")


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repo at a commit; threads may share it.

    It can be pickled for other machines; it does not contain the token, since each has its own.
    """

    source: Source
    endpoint: str
    received: ByteCounter = field(default_factory=ByteCounter, repr=False, compare=False)
    _located: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without signed addresses and counted bytes."""
        return type(self), (self.source, self.endpoint)

    def fetch(self, path: str, start: int, stop: int, take: Callable[[int, bytes], object]) -> None:
        """Download the bytes [start, stop) of a file; `take` gets each piece and its offset.

        After an interruption the download resumes behind the last byte received.

        Raises:
            SourceError: the download failed, or the file is not the pinned one.
        """
        hub_repo, position = HubRepo.of(HfApi(endpoint=self.endpoint), self.source), start

        def resume() -> None:
            nonlocal position
            for piece in self._stream_range(hub_repo, path, position, stop):
                self.received.add(len(piece))
                take(position, piece)
                position += len(piece)

        with hub_failures(hub_repo):
            retry_transfer(resume, lambda: position, min(MIN_TRANSFER_BYTES, stop - start))

    def _stream_range(self, hub_repo: HubRepo, path: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) that one request receives, and no more."""
        located = self._located.get(path)
        url = located or hub_repo.file_url(path)
        token = False if located else hub_repo.api.token  # the storage must not see the token
        with request_range(url, start, stop, token=token) as found:
            if located and found.status_code in OUTDATED:
                self._located.pop(path, None)
                raise httpx2.RemoteProtocolError("the address is outdated")
            hf_raise_for_status(found)
            size_bytes = self._require_range(hub_repo, path, (start, stop), found)
            if located is None and found.history and found.url.host != found.history[0].url.host:
                self._located[path] = str(found.url)
            yield from pieces_of(found, start, stop, size_bytes)

    def _require_range(
        self, hub_repo: HubRepo, path: str, wanted: tuple[int, int], found: httpx2.Response
    ) -> int:
        """Refuse an answer that does not contain these bytes of the pinned file; its size."""
        file = self.source.file(path)
        assert file  # its header was read
        start, stop = wanted
        content_range = found.headers.get("Content-Range", "")
        numbers = CONTENT_RANGE.fullmatch(content_range)
        tags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in found.history]
        if found.status_code != 206 or numbers is None:
            problem = f"the server does not serve byte ranges of `{path}`"
            problem += f" (status {found.status_code})"
            raise hub_repo.failed(problem, "Merge without --stream: it downloads whole files.")
        if tuple(map(int, numbers.groups())) != (start, stop - 1, file.size_bytes):
            problem = f"bytes {start}-{stop - 1}/{file.size_bytes} of `{path}` were requested, "
            problem += f"{content_range.removeprefix('bytes ')} received"
            raise hub_repo.failed(problem, "A proxy may be broken: merge without --stream.")
        if not {"", file.digest.partition(":")[2]}.issuperset(tags):
            raise hub_repo.another_file(path)
        return file.size_bytes


def read_range(api: HfApi, source: Source, path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, from disk if the file is there.

    Raises:
        SourceError: the source has no such file, it is shorter, or the download failed.
    """
    file = source.file(path)
    if file is None or not 0 <= start <= stop <= file.size_bytes:
        found = f"has {file.size_bytes} bytes" if file else "does not exist"
        raise SourceError(
            source.pinned,
            f"bytes {start} to {stop} of `{path}` were requested, but it {found}",
            "The file is cut short or its index is wrong: use an intact copy.",
        )
    if start == stop:
        return b""
    local = source.place / path
    if source.folder or local.exists():
        require_inside(source.place, local, SourceError)
        with local_reading(source.pinned), local.open("rb", buffering=0) as stored:
            stored.seek(start)
            return stored.read(stop - start)
    hub_repo = HubRepo.of(api, source)
    content = call_hub(hub_repo, lambda: _read_until(hub_repo, file, start, stop))
    if len(READ) >= MAX_READ:
        READ.clear()
    READ.setdefault(file.digest, set()).add((start, stop, sha256(content).digest()))
    return content


def _read_until(hub_repo: HubRepo, file: SourceFile, start: int, stop: int) -> bytes:
    """Read no further than `stop`, even if the server ignores ranges and sends the whole file."""
    url, token = hub_repo.file_url(file.path), hub_repo.api.token
    with request_range(url, start, stop, token=token) as found:
        return b"".join(pieces_of(found, start, stop, file.size_bytes))


def require_as_read(hub_repo: HubRepo, file: SourceFile, path: Path) -> None:
    """Refuse a file of which other bytes came before it was downloaded, such as another header."""
    for start, stop, digest in READ.pop(file.digest, ()):
        with path.open("rb") as opened:
            opened.seek(start)
            if sha256(opened.read(stop - start)).digest() != digest:
                raise hub_repo.another_file(file.path)
