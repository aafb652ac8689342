"""Downloads the files of a pinned source into huggingface_hub's cache."""

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
from lewis_hub.hub.failures import HubRepo, hub_failures
from lewis_hub.hub.retries import retry, retry_transfer
from lewis_hub.hub.source import ADAPTERS, PICKLED, Source, SourceFile
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from huggingface_hub import HfApi


PIECE_BYTES = 1 << 20
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


def partial_file(blob: Path) -> Path:
    """The file that holds the bytes of a blob until the download is complete."""
    return blob.with_name(f"{blob.name}.partial")


def download_blob(
    hub_repo: HubRepo,
    url: str,
    file: SourceFile,
    blob: Path,
    advance: Advance,
    stop: threading.Event,
) -> None:
    """Download `url` to `blob`; return early when `stop` is set, and keep the partial file.

    Raises:
        SourceError: the bytes do not have the digest that the Hub lists, at the second try too.
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
            retry_transfer(
                lambda: _append(hub_repo, url, file, blob, advance, stop), lambda: _size(part)
            )
            if stop.is_set():
                return
            if f"sha256:{sha256_of(part)}" == file.digest:
                part.rename(blob)
                return
            part.unlink()
    raise hub_repo.failed(
        f"`{file.path}` does not have the digest that {hub_repo.api.endpoint} lists",
        "Try again; if the error stays, a proxy or the repo itself is broken.",
    )


def _append(
    hub_repo: HubRepo,
    url: str,
    file: SourceFile,
    blob: Path,
    advance: Advance,
    stop: threading.Event,
) -> None:
    part = partial_file(blob)
    start = _size(part)
    if start >= file.size_bytes:
        part.touch()
        return
    headers = {
        **build_hf_headers(token=hub_repo.api.token),
        "Range": f"bytes={start}-",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        whole = response.status_code == 200  # the server ignored the range
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
    received = _Progress(advance, bytes_to_download(api, source, only))
    if received.total:
        remedy = "set HF_HUB_CACHE to a folder on a larger disk"
        require_room(cache_root(), received.total + SPARE_BYTES, _files_of(source), remedy)
    folder = snapshot_folder(source.name, source.repo_type, source.commit_sha)
    missing = [file for file in _selected_files(source, only) if not (folder / file.path).exists()]
    stop = threading.Event()
    hub_repo = HubRepo(api, source.name, source.repo_type, source.commit_sha)
    pool = ThreadPoolExecutor(N_DOWNLOADS)
    try:
        with hub_failures(hub_repo):
            for _ in pool.map(lambda file: _fetch_file(hub_repo, file, received, stop), missing):
                pass
    finally:
        stop.set()  # after an interruption the threads end at their next piece
        pool.shutdown(wait=False, cancel_futures=True)
    received.finish()
    return folder


def bytes_to_download(api: HfApi, source: Source, only: Sequence[str] | None = None) -> int:  # noqa: ARG001
    """The bytes that `fetch` would download; files and parts that are cached do not count."""
    if source.local_folder:
        return 0
    folder = snapshot_folder(source.name, source.repo_type, source.commit_sha)
    blobs = {
        _blob(source.name, source.repo_type, file): file for file in _selected_files(source, only)
    }
    return sum(
        max(0, file.size_bytes - _downloaded_bytes(blob))
        for blob, file in blobs.items()
        if not (folder / file.path).exists()
    )


def read_small(api: HfApi, source: Source, path: str) -> bytes | None:
    """The content of a small file, such as a card; None if the source has no such file."""
    if source.file(path) is None:
        return None
    for folder in (source.converted, source.folder):
        if folder and (folder / path).exists():
            return (folder / path).read_bytes()
    hub_repo = HubRepo(api, source.name, source.repo_type, source.commit_sha)
    with hub_failures(hub_repo):
        return retry(lambda: _through_cache(hub_repo, path)).read_bytes()


def _selected_files(source: Source, only: Sequence[str] | None) -> tuple[SourceFile, ...]:
    if only is None:
        only = (*map(glob.escape, weight_files(source)), *SIDECAR_FILES)
    found, weights = source.matching(only), weight_files(source)
    return tuple(f for f in found if f.path in weights or not f.path.endswith(NEVER))


def _fetch_file(
    hub_repo: HubRepo, file: SourceFile, received: _Progress, stop: threading.Event
) -> None:
    url = hf_hub_url(
        hub_repo.name,
        file.path,
        repo_type=hub_repo.repo_type,
        revision=hub_repo.revision,
        endpoint=hub_repo.api.endpoint,
    )
    blob = _blob(hub_repo.name, hub_repo.repo_type, file)
    if file.digest.startswith("sha256:") and not _is_stored_in_xet(hub_repo, url):
        download_blob(hub_repo, url, file, blob, received.advance, stop)
        if stop.is_set():
            return
        retry(lambda: _through_cache(hub_repo, file.path))  # links the blob into the snapshot
    else:
        retry(lambda: _through_cache(hub_repo, file.path, _bar(received.advance)))


def _is_stored_in_xet(hub_repo: HubRepo, url: str) -> bool:
    """Whether Xet stores a file; it downloads in parallel, but cannot resume a partial file."""
    if constants.HF_HUB_DISABLE_XET:
        return False
    return retry(lambda: hub_repo.api.get_hf_file_metadata(url=url)).xet_file_data is not None


def _through_cache(hub_repo: HubRepo, path: str, bar: type[Any] | None = None) -> Path:
    return Path(
        hf_hub_download(
            hub_repo.name,
            path,
            repo_type=hub_repo.repo_type,
            revision=hub_repo.revision,
            endpoint=hub_repo.api.endpoint,
            token=hub_repo.api.token,
            tqdm_class=bar or _bar(lambda _: None),
        )
    )


def _bar(advance: Advance) -> type[Any]:
    """A tqdm class that shows nothing and reports to `advance`."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Silent


@dataclass
class _Progress:
    """Counts bytes of several threads and never reports more than the total."""

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


def _downloaded_bytes(blob: Path) -> int:
    found = blob if blob.exists() else partial_file(blob)
    return found.stat().st_size if found.exists() else 0


def _files_of(source: Source) -> str:
    return f"the files of {source.pinned}"
