"""Downloads the files of a pinned source into huggingface_hub's cache, or byte ranges of them.

A merge that streams stores no file of its sources: it reads byte ranges.
"""

from __future__ import annotations

import glob
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from lewis_hub.display import Advance
from lewis_hub.errors import PublishError, SourceError
from lewis_hub.files import require_inside, require_room
from lewis_hub.hub.cache import (
    MAX_SMALL_BYTES,
    blob_path,
    digest_of,
    has_digest,
    link,
    partial_path,
    size_of,
    snapshot_path,
)
from lewis_hub.hub.failures import HubRepo, call_hub, hub_failures, retry, retry_transfer
from lewis_hub.hub.source import (
    ADAPTERS,
    LICENCES,
    PICKLED,
    Source,
    SourceFile,
    cache_root,
    digest_like,
    local_reading,
)

# folders of sentence-transformers, named in `modules.json`
MODULES = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")
SIDECAR_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    *MODULES,
    *LICENCES,
)
CODE_FILES = ("*.py",)  # only for sources whose code the user allowed
NEVER = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
N_DOWNLOADS = 4
SPARE_BYTES = 64 << 20  # never fill the disk to the last byte
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
OUTDATED = frozenset({401, 403, 404, 410})  # a signed address has expired
SHA256_LETTERS = 64
MAX_READ = 1000
# digest of a file -> beginning, end and digest of what was read of it alone
READ: dict[str, set[tuple[int, int, bytes]]] = {}
MIN_TRANSFER_BYTES = 1 << 16  # of several attempts in a row: fewer would take days


def weight_files(source: Source) -> tuple[str, ...]:
    """The files with the model's weights: some repos have the same weights twice."""
    if source.is_adapter:
        return ADAPTERS[1:]
    if source.is_pickled:
        whole, shards = (source.matching((pattern,)) for pattern in PICKLED)
        return tuple(file.path for file in whole or shards)
    found = [file.path for file in source.matching(("*.safetensors",)) if file.path not in ADAPTERS]
    return tuple(path for path in found if path.startswith("model")) or tuple(found)


def fetch(api: HfApi, source: Source, advance: Advance, only: Sequence[str] | None = None) -> Path:
    """Download the files of a source that are not on this machine yet.

    Args:
        api: whose endpoint and token are used.
        source: a local folder is returned as it is.
        advance: called with the number of bytes received; they sum to `bytes_to_download`.
        only: shell patterns (`*` stays within a folder); None: weights, configuration and
            tokenizer. Pickled weights are downloaded only if a source has no others; such a
            source does not resolve unless the user allowed pickles.

    Returns:
        A folder that holds the files at this commit. It is a cache: never write into it.

    Raises:
        OutputError: the disk is too full.
        SourceError: a download failed, or a file does not have the digest that the Hub lists.
            A later call resumes behind the bytes received.
    """
    if source.local_folder:
        return source.local_folder
    received = ByteCounter(bytes_to_download(source, only), advance)
    if received.total:
        remedy = "set HF_HUB_CACHE to a folder on a larger disk"
        content = f"the files of {source.pinned}"
        require_room(cache_root(), received.total + SPARE_BYTES, content, remedy)
    stop = threading.Event()
    hub_repo = HubRepo.of(api, source)
    pool = ThreadPoolExecutor(N_DOWNLOADS)
    try:
        with hub_failures(hub_repo):
            missing = _missing_files(source, only)
            for _ in pool.map(lambda file: _fetch_file(hub_repo, file, received, stop), missing):
                pass
    finally:
        stop.set()  # after an interruption the threads end at their next piece
        pool.shutdown(wait=False, cancel_futures=True)
    received.add(received.total - received.n_bytes)
    return source.snapshot


def bytes_to_download(source: Source, only: Sequence[str] | None = None) -> int:
    """The bytes that `fetch` would download; files and parts that are cached do not count."""
    if source.local_folder:
        return 0
    blobs = {blob_path(source.name, source.repo_type, f): f for f in _missing_files(source, only)}
    return sum(
        max(0, file.size_bytes - (size_of(blob) or size_of(partial_path(blob))))
        for blob, file in blobs.items()
    )


def read_small(api: HfApi, source: Source, path: str) -> bytes | None:
    """The content of a small file, such as a card; None if the source has no such file."""
    file, hub_repo = source.file(path), HubRepo.of(api, source)
    if file is None:
        return None
    for folder in (source.converted, source.folder):
        if folder and (folder / path).exists():
            require_inside(folder, folder / path, SourceError)
            content = _read_whole(hub_repo, path, folder / path)
            if digest_like(file.digest, content) != file.digest:
                raise _changed(source, folder / path)
            return content
    _require_small(hub_repo, path, file.size_bytes)
    return read_file(hub_repo, path, file.digest)


def read_pinned(source: Source, file: SourceFile) -> bytes:
    """The content of a small file of a fetched source, which must still be the pinned one.

    Raises:
        SourceError: it is missing, is no file of the source's folder, or has another content.
    """
    path = source.place / file.path
    require_inside(source.place, path, SourceError)
    require_small(source, file)
    if path.stat().st_size == file.size_bytes:
        content = path.read_bytes()
        if digest_like(file.digest, content) == file.digest:
            return content
    raise _changed(source, path)


def _changed(source: Source, path: Path) -> SourceError:
    problem = f"{path} changed after its digest was read"
    return SourceError(source.pinned, problem, "Restore or delete it, then run again.")


def require_small(source: Source, file: SourceFile) -> None:
    """Refuse a file that is too large to be read whole."""
    if file.size_bytes > MAX_SMALL_BYTES:
        raise SourceError(source.pinned, *_too_large(file.path))


def read_file(hub_repo: HubRepo, path: str, digest: str) -> bytes:
    """The content of a small file of a repo, which is then in the cache.

    Raises:
        SourceError: it has not the digest that the Hub lists, or the download failed.
    """
    cached = try_to_load_from_cache(
        hub_repo.name, path, revision=hub_repo.revision, repo_type=hub_repo.repo_type
    )
    if isinstance(cached, str):
        content = _read_whole(hub_repo, path, Path(cached))
        if digest_like(digest, content) == digest:
            return content
        if is_offline_mode():
            raise _another(hub_repo, path)
        Path(cached).unlink(missing_ok=True)
    content = _read_whole(hub_repo, path, _small_file(hub_repo, path, digest))
    if digest_like(digest, content) != digest:
        raise _another(hub_repo, path)
    return content


def _small_file(hub_repo: HubRepo, path: str, digest: str) -> Path:
    """A small file, downloaded into the cache."""
    with hub_failures(hub_repo):
        if is_offline_mode():
            raise OfflineModeIsEnabled
        url, metadata = hub_repo.file_url(path), hub_repo.api.get_hf_file_metadata
        known = retry(lambda: metadata(url=url))
        _require_small(hub_repo, path, known.size or 0)
        file = SourceFile(path, known.size or 0, digest)
        _download_blob(hub_repo, file, ByteCounter(), threading.Event())
        return link(hub_repo, file)


def _another(hub_repo: HubRepo, path: str) -> SourceError | PublishError:
    problem = f"`{path}` is another file than {hub_repo.api.endpoint} lists"
    return hub_repo.failed(problem, "Run the same command again; it resolves the files again.")


def _read_whole(hub_repo: HubRepo, path: str, file: Path) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(MAX_SMALL_BYTES + 1)
    _require_small(hub_repo, path, len(content))
    return content


def _require_small(hub_repo: HubRepo, path: str, n_bytes: int) -> None:
    if n_bytes > MAX_SMALL_BYTES:
        raise hub_repo.failed(*_too_large(path))


def _too_large(path: str) -> tuple[str, str]:
    problem = f"`{path}` has more than {MAX_SMALL_BYTES:,} bytes, so it is not read"
    return problem, "Use an intact copy of the repo or folder."


def _missing_files(source: Source, only: Sequence[str] | None) -> list[SourceFile]:
    weights = weight_files(source)
    patterns = (*map(glob.escape, weights), *SIDECAR_FILES) if only is None else only
    selected = source.matching(patterns)
    allowed = (f for f in selected if f.path in weights or not f.path.endswith(NEVER))
    if not source.is_adapter:  # with peft, transformers would look for an adapter beside the model
        allowed = (f for f in allowed if f.path not in ADAPTERS)
    return [file for file in allowed if not (source.snapshot / file.path).exists()]


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


def _fetch_file(
    hub_repo: HubRepo, file: SourceFile, received: ByteCounter, stop: threading.Event
) -> None:
    is_large = file.digest.startswith("sha256:")
    if not is_large:
        _require_small(hub_repo, file.path, file.size_bytes)
    is_cached = blob_path(hub_repo.name, hub_repo.repo_type, file).exists()
    if is_large and not is_cached and _is_stored_in_xet(hub_repo, file):
        path = _download_from_xet(hub_repo, file, received)
    else:
        _download_blob(hub_repo, file, received, stop)
        if stop.is_set():
            return
        path = link(hub_repo, file)
    _require_as_read(hub_repo, file, path)


def _download_from_xet(hub_repo: HubRepo, file: SourceFile, received: ByteCounter) -> Path:
    """Let huggingface_hub download a file; it compares sizes, and names a blob by its ETag.

    Raises:
        SourceError: it is not the file that the Hub lists; the cache does not have it then.
    """
    path = retry(lambda: _through_cache(hub_repo, file.path, received.add))
    blob = blob_path(hub_repo.name, hub_repo.repo_type, file)
    named = blob.with_name(path.readlink().name) if path.is_symlink() else blob
    is_listed = (path, named) == (snapshot_path(hub_repo, file), blob)
    if is_listed and digest_of(path, file) == file.digest:
        return path
    path.unlink()
    kind = "sha256" if len(named.name) == SHA256_LETTERS else "git-sha1"
    stated = replace(file, digest=f"{kind}:{named.name}")
    if named.exists() and not has_digest(named, stated):
        named.unlink()
    raise _another(hub_repo, file.path)


def _require_as_read(hub_repo: HubRepo, file: SourceFile, path: Path) -> None:
    """Refuse a file of which other bytes came before it was downloaded, such as another header."""
    for start, stop, digest in READ.pop(file.digest, ()):
        with path.open("rb") as opened:
            opened.seek(start)
            if sha256(opened.read(stop - start)).digest() != digest:
                raise _another(hub_repo, file.path)


def _is_stored_in_xet(hub_repo: HubRepo, file: SourceFile) -> bool:
    """Whether Xet stores a file; it downloads in parallel, but cannot resume a partial file."""
    if constants.HF_HUB_DISABLE_XET:
        return False
    url = hub_repo.file_url(file.path)
    return retry(lambda: hub_repo.api.get_hf_file_metadata(url=url)).xet_file_data is not None


def _download_blob(
    hub_repo: HubRepo, file: SourceFile, received: ByteCounter, stop: threading.Event
) -> None:
    """Download a file into the cache; return early when `stop` is set, and keep the partial file.

    Raises:
        SourceError: the bytes do not have the digest that the Hub lists, at the second try too.
    """
    blob = blob_path(hub_repo.name, hub_repo.repo_type, file)
    part = partial_path(blob)
    lock = cache_root() / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"  # the client's
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists() and not has_digest(blob, file):  # of another program, and another mirror
            blob.unlink()
        for _ in range(2):
            if blob.exists() or stop.is_set():
                return
            retry_transfer(
                lambda: _append(hub_repo, file, part, received, stop),
                lambda: size_of(part),
                MIN_TRANSFER_BYTES,
            )
            if stop.is_set():
                return
            if digest_of(part, file) == file.digest:
                part.replace(blob)
                return
            part.unlink()
    raise hub_repo.failed(
        f"`{file.path}` does not have the digest that {hub_repo.api.endpoint} lists",
        "Try again; if the error stays, a proxy or the repo itself is broken.",
    )


def _append(
    hub_repo: HubRepo, file: SourceFile, part: Path, received: ByteCounter, stop: threading.Event
) -> None:
    """Download the bytes of a file behind those in its partial file."""
    start = size_of(part)
    if start >= file.size_bytes:
        part.touch()
        return
    with _get(hub_repo.file_url(file.path), start, token=hub_repo.api.token) as found:
        pieces = _pieces(found, start, file.size_bytes, file.size_bytes)
        with part.open("ab") as out:
            for piece in pieces:
                out.write(piece)
                received.add(len(piece))
                if stop.is_set():
                    return


def _get(
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


def _pieces(found: httpx2.Response, start: int, stop: int, size_bytes: int) -> Iterator[bytes]:
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


def _through_cache(hub_repo: HubRepo, path: str, advance: Advance) -> Path:
    return Path(
        hf_hub_download(
            hub_repo.name,
            path,
            repo_type=hub_repo.repo_type,
            revision=hub_repo.revision,
            endpoint=hub_repo.api.endpoint,
            token=hub_repo.api.token,
            tqdm_class=_silent_bar(advance),
        )
    )


def _silent_bar(advance: Advance) -> type[Any]:
    """A tqdm class that shows nothing and reports to `advance`."""
    from huggingface_hub.utils import tqdm

    class ReportingTqdm(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return ReportingTqdm


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
        with _get(url, start, stop, token=token) as found:
            if located and found.status_code in OUTDATED:
                self._located.pop(path, None)
                raise httpx2.RemoteProtocolError("the address is outdated")
            hf_raise_for_status(found)
            size_bytes = self._require_range(hub_repo, path, (start, stop), found)
            if located is None and found.history and found.url.host != found.history[0].url.host:
                self._located[path] = str(found.url)
            yield from _pieces(found, start, stop, size_bytes)

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
            raise _another(hub_repo, path)
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
    with _get(hub_repo.file_url(file.path), start, stop, token=hub_repo.api.token) as found:
        return b"".join(_pieces(found, start, stop, file.size_bytes))
