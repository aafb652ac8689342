"""A pinned source -> files on this machine, in huggingface_hub's cache."""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from lewis_hub.files import require_room, sha256_of
from lewis_hub.hub.cache import cache_folder, cache_root, snapshot_folder
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import complete, persist
from lewis_hub.hub.source import ADAPTERS, PICKLED, Source, SourceFile
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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


SIDECAR_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
CODE_FILES = ("*.py",)  # only for sources whose code the user allowed
NEVER = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
N_DOWNLOADS = 4
SPARE_BYTES = 64 << 20  # never fill the disk to the last byte


def weight_files(source: Source) -> tuple[str, ...]:
    """The files that are the model: some repos carry the same weights a second time."""
    if source.is_adapter:
        return ADAPTERS[1:]
    if source.is_pickled:
        whole, shards = (source.matching((pattern,)) for pattern in PICKLED)
        return tuple(file.path for file in whole or shards)
    found = [file.path for file in source.matching(("*.safetensors",)) if file.path not in ADAPTERS]
    return tuple(path for path in found if path.startswith("model")) or tuple(found)


def fetch(api: HfApi, source: Source, advance: Advance, only: Sequence[str] | None = None) -> Path:
    """Bring the files of a source here; what is here already is not fetched again.

    Args:
        api: whose endpoint and token are used.
        source: what to fetch; a local folder is handed back as it is.
        advance: called with the bytes that arrived, in all `bytes_to_download`.
        only: shell patterns (`*` stays within a folder); None: weights, configuration and
            tokenizer. Pickled weights are fetched only where a source has no others, which
            does not resolve unless the user allowed it.

    Returns:
        A folder that holds the files at this commit. It is a cache: never write into it.

    Raises:
        OutputError: the disk is too full.
        SourceError: the files cannot be had, or they are not what the
            Hub says they are. A later call goes on from the bytes that arrived.
    """
    if source.here:
        return source.here
    arrived = _Arrived(advance, bytes_to_download(api, source, only))
    if arrived.total:
        remedy = "set HF_HUB_CACHE to a folder on a larger disk"
        require_room(cache_root(), arrived.total + SPARE_BYTES, _files_of(source), remedy)
    folder = snapshot_folder(source.name, source.repo_type, source.commit_sha)
    missing = [file for file in _wanted(source, only) if not (folder / file.path).exists()]
    stop = threading.Event()
    asked = Asked(api, source.name, source.repo_type, source.commit_sha)
    pool = ThreadPoolExecutor(N_DOWNLOADS)
    try:
        with hub_failures(asked):
            for _ in pool.map(lambda file: _fetch_file(asked, file, arrived, stop), missing):
                pass
    finally:
        stop.set()  # after an interruption the threads leave at their next piece
        pool.shutdown(wait=False, cancel_futures=True)
    arrived.finish()
    return folder


def bytes_to_download(api: HfApi, source: Source, only: Sequence[str] | None = None) -> int:  # noqa: ARG001
    """What `fetch` would download: neither cached files nor the part of one that arrived count."""
    if source.here:
        return 0
    folder = snapshot_folder(source.name, source.repo_type, source.commit_sha)
    blobs = {_blob(source.name, source.repo_type, file): file for file in _wanted(source, only)}
    return sum(
        max(0, file.size_bytes - _here_bytes(blob))
        for blob, file in blobs.items()
        if not (folder / file.path).exists()
    )


def read_small(api: HfApi, source: Source, path: str) -> bytes | None:
    """The content of a JSON, card or template file; None if the source has no such file."""
    if source.file(path) is None:
        return None
    for folder in (source.converted, source.folder):
        if folder and (folder / path).exists():
            return (folder / path).read_bytes()
    asked = Asked(api, source.name, source.repo_type, source.commit_sha)
    with hub_failures(asked):
        return persist(lambda: _through_cache(asked, path)).read_bytes()


def _wanted(source: Source, only: Sequence[str] | None) -> tuple[SourceFile, ...]:
    if only is None:
        only = (*map(glob.escape, weight_files(source)), *SIDECAR_FILES)
    found, weights = source.matching(only), weight_files(source)
    return tuple(f for f in found if f.path in weights or not f.path.endswith(NEVER))


def _fetch_file(asked: Asked, file: SourceFile, arrived: _Arrived, stop: threading.Event) -> None:
    url = hf_hub_url(
        asked.repo,
        file.path,
        repo_type=asked.repo_type,
        revision=asked.revision,
        endpoint=asked.api.endpoint,
    )
    blob = _blob(asked.repo, asked.repo_type, file)
    if file.digest.startswith("sha256:") and not _comes_by_xet(asked, url):
        download_blob(asked, url, file, blob, arrived.advance, stop)
        if stop.is_set():
            return
        persist(lambda: _through_cache(asked, file.path))  # links the blob into the snapshot
    else:
        persist(lambda: _through_cache(asked, file.path, _bar(arrived.advance)))


def _comes_by_xet(asked: Asked, url: str) -> bool:
    """Xet brings large files in parallel pieces of its own, but cannot go on from a part."""
    if constants.HF_HUB_DISABLE_XET:
        return False
    return persist(lambda: asked.api.get_hf_file_metadata(url=url)).xet_file_data is not None


def _through_cache(asked: Asked, path: str, bar: type[Any] | None = None) -> Path:
    return Path(
        hf_hub_download(
            asked.repo,
            path,
            repo_type=asked.repo_type,
            revision=asked.revision,
            endpoint=asked.api.endpoint,
            token=asked.api.token,
            tqdm_class=bar or _bar(lambda _: None),
        )
    )


def _bar(advance: Advance) -> type[Any]:
    """A progress bar class that shows nothing and reports to `advance`."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Silent


@dataclass
class _Arrived:
    """Counts bytes from several threads and never reports more than the total."""

    report: Callable[[int], None]
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            n_bytes = min(n_bytes, self.total - self.done)
            if n_bytes > 0:
                self.done += n_bytes
                self.report(n_bytes)

    def finish(self) -> None:
        self.advance(self.total - self.done)


def _blob(repo: str, repo_type: str, file: SourceFile) -> Path:
    return cache_folder(repo, repo_type) / "blobs" / file.digest.partition(":")[2]


def _here_bytes(blob: Path) -> int:
    found = blob if blob.exists() else partial_file(blob)
    return found.stat().st_size if found.exists() else 0


def _files_of(source: Source) -> str:
    return f"the files of {source.pinned}"
