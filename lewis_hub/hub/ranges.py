"""The weights of a repo, range by range, for a merge that keeps no file of its sources."""

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
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import complete, persist
from lewis_hub.hub.source import Source

if TYPE_CHECKING:
    from pathlib import Path


CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
OUTDATED = frozenset({401, 403, 404, 410})  # of a signed address: it is asked for again


class Arrived:
    """A number of bytes that several threads add to."""

    def __init__(self) -> None:
        self.n_bytes, self._adding = 0, threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Count some more."""
        with self._adding:
            self.n_bytes += n_bytes


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repo at a commit. Threads may share it; it travels to other machines.

    There the token is that of the machine: it is no part of this.

    Attributes:
        endpoint: the Hub's address.
        arrived: counts the bytes that came here.
    """

    source: Source
    endpoint: str
    arrived: Arrived = field(default_factory=Arrived, repr=False, compare=False)
    _located: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Signed addresses and what was counted stay here."""
        return type(self), (self.source, self.endpoint)

    def fetch(self, path: str, start: int, stop: int, take: Callable[[int, bytes], object]) -> None:
        """Bring the bytes [start, stop) of a file, in pieces and in order.

        What breaks off goes on behind the bytes that came.

        Args:
            path: of the file.
            start: first byte.
            stop: behind the last byte.
            take: called with where a piece begins in the file, and the piece.

        Raises:
            SourceError: they cannot be had, or are no part of the file that was pinned.
        """
        api, position = HfApi(endpoint=self.endpoint), start
        asked = Asked(api, self.source.name, self.source.repo_type, self.source.commit_sha)

        def go_on() -> None:
            nonlocal position
            for piece in self._pieces(asked, path, position, stop):
                self.arrived.add(len(piece))
                take(position, piece)
                position += len(piece)

        with hub_failures(asked):
            complete(go_on, lambda: position)

    def _pieces(self, asked: Asked, path: str, start: int, stop: int) -> Iterator[bytes]:
        """What one request brings of [start, stop), and no byte more."""
        url = hf_hub_url(
            asked.repo,
            path,
            repo_type=asked.repo_type,
            revision=asked.revision,
            endpoint=self.endpoint,
        )
        located = self._located.get(path)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if located is None:  # whoever stores large files is told no token
            headers |= build_hf_headers(token=asked.api.token)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", located or url, headers=headers, timeout=timeout) as found:
            if located and found.status_code in OUTDATED:
                self._located.pop(path, None)
                raise ConnectionResetError("Consistency check failed: the address is outdated")
            hf_raise_for_status(found)
            self._require_range(asked, path, (start, stop), found)
            if located is None and found.history and found.url.host != found.history[0].url.host:
                self._located[path] = str(found.url)
            left = stop - start
            for piece in found.iter_raw():
                yield piece[:left]
                left -= min(left, len(piece))
        if left:
            raise ConnectionResetError("Consistency check failed: the range ended early")

    def _require_range(
        self, asked: Asked, path: str, wanted: tuple[int, int], found: httpx2.Response
    ) -> None:
        """Refuse an answer that is not these bytes of the pinned file."""
        file = self.source.file(path)
        assert file  # its header was read
        start, stop = wanted
        told = found.headers.get("Content-Range", "")
        numbers = CONTENT_RANGE.fullmatch(told)
        if found.status_code != 206 or numbers is None:
            problem = f"`{path}` is not given out by byte ranges (status {found.status_code})"
            raise asked.failed(problem, "Merge without --stream: it downloads whole files.")
        if tuple(map(int, numbers.groups())) != (start, stop - 1, file.size_bytes):
            problem = (
                f"bytes {start}-{stop - 1}/{file.size_bytes} of `{path}` were asked for, "
                f"{told.removeprefix('bytes ')} came"
            )
            raise asked.failed(problem, "A proxy on the way may be broken: merge without --stream.")
        tags = [one.headers.get("X-Linked-Etag", "") for one in found.history]
        if any(tag and tag.strip('"') != file.digest.partition(":")[2] for tag in tags):
            problem = f"`{path}` is another file than {asked.api.endpoint} lists"
            raise asked.failed(problem, "Run the same command again; it looks the files up anew.")


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
