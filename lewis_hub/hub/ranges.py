"""Reads byte ranges of a repo's files, for a merge that stores no file of its sources."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from lewis_hub.errors import SourceError
from lewis_hub.hub.cache import snapshot_folder
from lewis_hub.hub.failures import HubRepo, hub_failures
from lewis_hub.hub.retries import retry, retry_transfer
from lewis_hub.hub.source import Source

if TYPE_CHECKING:
    from pathlib import Path


CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
OUTDATED = frozenset({401, 403, 404, 410})  # a signed address has expired


class ByteCounter:
    """A number of bytes to which several threads add."""

    def __init__(self) -> None:
        self.n_bytes, self._adding = 0, threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Add to the number."""
        with self._adding:
            self.n_bytes += n_bytes


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repo at a commit.

    Threads may share it. It can be pickled for other machines; it does not contain the token, since
    each machine has its own.

    Attributes:
        endpoint: the Hub's address.
        received: counts the bytes received on this machine.
    """

    source: Source
    endpoint: str
    received: ByteCounter = field(default_factory=ByteCounter, repr=False, compare=False)
    _located: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without signed addresses and counted bytes."""
        return type(self), (self.source, self.endpoint)

    def fetch(self, path: str, start: int, stop: int, take: Callable[[int, bytes], object]) -> None:
        """Download the bytes [start, stop) of a file, in pieces and in order.

        After an interruption the download resumes behind the last byte received.

        Args:
            path: of the file.
            start: first byte.
            stop: one behind the last byte.
            take: called with the offset of a piece in the file, and the piece.

        Raises:
            SourceError: the download failed, or the file is not the pinned one.
        """
        api, position = HfApi(endpoint=self.endpoint), start
        hub_repo = HubRepo(api, self.source.name, self.source.repo_type, self.source.commit_sha)

        def resume() -> None:
            nonlocal position
            for piece in self._stream_range(hub_repo, path, position, stop):
                self.received.add(len(piece))
                take(position, piece)
                position += len(piece)

        with hub_failures(hub_repo):
            retry_transfer(resume, lambda: position)

    def _stream_range(self, hub_repo: HubRepo, path: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) that one request receives, and no more."""
        url = hf_hub_url(
            hub_repo.name,
            path,
            repo_type=hub_repo.repo_type,
            revision=hub_repo.revision,
            endpoint=self.endpoint,
        )
        located = self._located.get(path)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if located is None:  # the storage of large files must not see the token
            headers |= build_hf_headers(token=hub_repo.api.token)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", located or url, headers=headers, timeout=timeout) as found:
            if located and found.status_code in OUTDATED:
                self._located.pop(path, None)
                raise ConnectionResetError("Consistency check failed: the address is outdated")
            hf_raise_for_status(found)
            self._require_range(hub_repo, path, (start, stop), found)
            if located is None and found.history and found.url.host != found.history[0].url.host:
                self._located[path] = str(found.url)
            left = stop - start
            for piece in found.iter_raw():
                yield piece[:left]
                left -= min(left, len(piece))
        if left:
            raise ConnectionResetError("Consistency check failed: the range ended early")

    def _require_range(
        self, hub_repo: HubRepo, path: str, wanted: tuple[int, int], found: httpx2.Response
    ) -> None:
        """Refuse an answer that does not contain these bytes of the pinned file."""
        file = self.source.file(path)
        assert file  # its header was read
        start, stop = wanted
        content_range = found.headers.get("Content-Range", "")
        numbers = CONTENT_RANGE.fullmatch(content_range)
        if found.status_code != 206 or numbers is None:
            problem = (
                f"the server does not serve byte ranges of `{path}` (status {found.status_code})"
            )
            raise hub_repo.failed(problem, "Merge without --stream: it downloads whole files.")
        if tuple(map(int, numbers.groups())) != (start, stop - 1, file.size_bytes):
            problem = (
                f"bytes {start}-{stop - 1}/{file.size_bytes} of `{path}` were requested, "
                f"{content_range.removeprefix('bytes ')} received"
            )
            raise hub_repo.failed(problem, "A proxy may be broken: merge without --stream.")
        tags = [answer.headers.get("X-Linked-Etag", "") for answer in found.history]
        if any(tag and tag.strip('"') != file.digest.partition(":")[2] for tag in tags):
            problem = f"`{path}` is another file than {hub_repo.api.endpoint} lists"
            raise hub_repo.failed(
                problem, "Run the same command again; it resolves the files again."
            )


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
    local = source.local_folder or snapshot_folder(source.name, source.repo_type, source.commit_sha)
    if (local / path).exists():
        return _pread(local / path, start, stop)
    url = hf_hub_url(
        source.name,
        path,
        repo_type=source.repo_type,
        revision=source.commit_sha,
        endpoint=api.endpoint,
    )
    with hub_failures(HubRepo(api, source.name, source.repo_type, source.commit_sha)):
        return retry(lambda: _get(api, url, start, stop))


def _pread(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), stop - start, start)


def _get(api: HfApi, url: str, start: int, stop: int) -> bytes:
    """Read no further than `stop`, even if the server ignores ranges and sends the whole file."""
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
