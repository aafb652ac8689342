"""Downloads whole files of a pinned source into huggingface_hub's cache."""

from __future__ import annotations

import glob
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock

from lewis_hub.display import Advance
from lewis_hub.documents import MAX_JSON_VALUES, MAX_TABLE_BYTES, count_values, read_json
from lewis_hub.errors import SourceError
from lewis_hub.files import require_inside, require_room, size_of
from lewis_hub.hub.answers import FILE_BYTES
from lewis_hub.hub.cache import (
    MAX_SMALL_BYTES,
    blob_path,
    damaged_files,
    digest_of,
    has_digest,
    link,
    partial_path,
    snapshot_path,
)
from lewis_hub.hub.failures import HubRepo, hub_failures, retry, retry_transfer
from lewis_hub.hub.ranges import (
    MIN_TRANSFER_BYTES,
    ByteCounter,
    pieces_of,
    request_range,
    require_as_read,
)
from lewis_hub.hub.source import (
    ADAPTERS,
    LICENCES,
    MODULES,
    PICKLED,
    SINGLE,
    Source,
    SourceFile,
    cache_root,
    digest_like,
    local_reading,
)

OF_MODULES = tuple(f"[0-9]_*/{name}" for name in ("*.json", "vocab.txt", "model.safetensors"))
INDEX = f"{SINGLE}.index.json"
SIDECAR_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    *OF_MODULES,
    *LICENCES,
)
# small files that transformers, tokenizers and sentence-transformers read whole where a model is
READ_WHOLE = (
    *("*config.json", "config_*.json", "*.index.json", MODULES, "[0-9]_*/*config.json"),
    *("*token*.json", "tekken.json", "vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*.jinja", "README.md"),
)
CODE_FILES = ("*.py",)  # only for sources whose code the user allowed
NEVER = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
N_DOWNLOADS = 4
SPARE_BYTES = 64 << 20  # never fill the disk to the last byte
SHA256_LETTERS = 64
INTACT = "Use an intact copy of the repo or folder."


def weight_files(source: Source) -> tuple[str, ...]:
    """The files with the model's weights: those that transformers reads, if a repo has several."""
    if source.is_adapter:
        return ADAPTERS[1:]
    if source.is_pickled:
        whole, shards = (source.matching((pattern,)) for pattern in PICKLED)
        return tuple(file.path for file in whole or shards)
    if source.file(SINGLE):
        return (SINGLE,)
    found = _safetensors(source)
    if source.shards:
        return tuple(path for path in found if path in source.shards)
    return tuple(path for path in found if path.startswith("model")) or tuple(found)


def _safetensors(source: Source) -> list[str]:
    """The files that may hold weights of a model."""
    return [file.path for file in source.matching(("*.safetensors",)) if file.path not in ADAPTERS]


def with_shards(api: HfApi, source: Source) -> Source:
    """The source with what its index names, if the names of its files leave open what they are.

    Beside its shards, `model-00001-of-00002.safetensors`, a repo may have `mtp.safetensors`, which
    its index names, or a `consolidated.safetensors`, which it does not.
    """
    if source.file(SINGLE) or all(path.startswith("model") for path in _safetensors(source)):
        return source
    try:
        index = read_json(read_small(api, source, INDEX) or b"{}", MAX_TABLE_BYTES)
    except ValueError:  # where it is opened, the message says what is wrong
        return source
    located = index.get("weight_map") if isinstance(index, dict) else None
    shards = located.values() if isinstance(located, dict) else ()
    return replace(source, shards=frozenset(one for one in shards if isinstance(one, str)))


def fetch(api: HfApi, source: Source, advance: Advance, only: Sequence[str] | None = None) -> Path:
    """Download the files of a source that are not on this machine yet, or are damaged there.

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
        SourceError: a file that is read whole is too large, a download failed, or a file does not
            have the digest that the Hub lists. A later call resumes behind the bytes received.
    """
    for file in source.matching(READ_WHOLE):
        require_small(source, file)
    if source.local_folder:
        return _with_few_values(source, source.local_folder)
    fetch_files(api, source, _wanted_files(source, only), advance)
    return _with_few_values(source, source.snapshot)


def fetch_files(
    api: HfApi, source: Source, files: Sequence[SourceFile], advance: Advance = lambda _: None
) -> None:
    """Download files of a repo into the cache, each with the digest that the Hub lists.

    A damaged file is replaced when its bytes have arrived: other runs may read it.

    Raises:
        OutputError, SourceError: as `fetch`.
    """
    missing, damaged = _not_cached(source, files), _damaged(source, files)
    n_bytes = _bytes_to_download(source, missing) + sum(file.size_bytes for file in damaged)
    received = ByteCounter(n_bytes, advance)
    if received.total:
        remedy = "set HF_HUB_CACHE to a folder on a larger disk"
        content = f"the files of {source.pinned}"
        require_room(cache_root(), received.total + SPARE_BYTES, content, remedy)
    stop = threading.Event()
    hub_repo = HubRepo.of(api, source)
    pool = ThreadPoolExecutor(N_DOWNLOADS)
    try:
        with hub_failures(hub_repo):
            wanted = (*missing, *damaged)
            for _ in pool.map(lambda file: _fetch_file(hub_repo, file, received, stop), wanted):
                pass
    finally:
        stop.set()  # after an interruption the threads end at their next piece
        pool.shutdown(wait=False, cancel_futures=True)
    received.add(received.total - received.n_bytes)


def replace_damaged(api: HfApi, source: Source, files: Iterable[SourceFile]) -> None:
    """Download the files again that the cache has with other bytes than the Hub lists.

    Raises:
        OutputError, SourceError: as `fetch`.
    """
    fetch_files(api, source, _damaged(source, files))


def _with_few_values(source: Source, folder: Path) -> Path:
    """The folder of a source, if no JSON in it has so many values that they take all memory."""
    for file in source.matching(READ_WHOLE):
        if file.path.endswith(".json") and (folder / file.path).is_file():
            with (folder / file.path).open("rb") as opened:
                n_values = count_values(opened.read(MAX_SMALL_BYTES))
            if n_values > MAX_JSON_VALUES:
                problem = f"`{file.path}` has {n_values:,} values, the limit is {MAX_JSON_VALUES:,}"
                raise SourceError(source.pinned, problem, INTACT)
    return folder


def bytes_to_download(source: Source, only: Sequence[str] | None = None) -> int:
    """The bytes that `fetch` would download; files and parts that are cached do not count."""
    if source.local_folder:
        return 0
    return _bytes_to_download(source, _not_cached(source, _wanted_files(source, only)))


def _bytes_to_download(source: Source, files: Sequence[SourceFile]) -> int:
    blobs = {blob_path(source.name, source.repo_type, file): file for file in files}
    return sum(
        max(0, file.size_bytes - (size_of(partial_path(blob)) or size_of(blob)))
        for blob, file in blobs.items()
    )


def read_small(api: HfApi, source: Source, path: str) -> bytes | None:
    """The content of a small file, such as a card; None if the source has no such file."""
    file, hub_repo = source.file(path), HubRepo.of(api, source)
    if file is None:
        return None
    folder = source.folder
    if source.converted and (source.converted / path).exists():  # others stay where they are
        folder = source.converted
    if folder:
        require_inside(folder, folder / path, SourceError)
        with local_reading(source.pinned):
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
            raise hub_repo.another_file(path)
    content = _read_whole(hub_repo, path, _small_file(hub_repo, path, digest))
    if digest_like(digest, content) != digest:
        raise hub_repo.another_file(path)
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
    return problem, INTACT


def _wanted_files(source: Source, only: Sequence[str] | None) -> list[SourceFile]:
    weights = weight_files(source)
    patterns = (*map(glob.escape, weights), *SIDECAR_FILES) if only is None else only
    selected = source.matching(patterns)
    allowed = (f for f in selected if f.path in weights or not f.path.endswith(NEVER))
    if not source.is_adapter:  # with peft, transformers would look for an adapter beside the model
        allowed = (f for f in allowed if f.path not in ADAPTERS)
    return list(allowed)


def _damaged(source: Source, files: Iterable[SourceFile]) -> list[SourceFile]:
    damaged = damaged_files(source.place, files)
    if damaged and is_offline_mode():
        problem = (
            f"{source.snapshot / damaged[0].path} does not have the digest that it is named by"
        )
        remedy = "Run the same command again with a connection: it fetches the file again."
        raise SourceError(source.pinned, problem, remedy)
    return damaged


def _not_cached(source: Source, files: Iterable[SourceFile]) -> list[SourceFile]:
    return [file for file in files if not (source.snapshot / file.path).exists()]


def _fetch_file(
    hub_repo: HubRepo, file: SourceFile, received: ByteCounter, stop: threading.Event
) -> None:
    is_large = file.digest.startswith("sha256:")
    if not is_large:
        _require_small(hub_repo, file.path, file.size_bytes)
    blob, path = blob_path(hub_repo.name, hub_repo.repo_type, file), snapshot_path(hub_repo, file)
    is_cached = blob.exists() or path.exists()  # and damaged, or another commit has it
    is_from_xet = is_large and not is_cached and _is_stored_in_xet(hub_repo, file)
    if not (is_from_xet and _download_from_xet(hub_repo, file, received)):
        _download_blob(hub_repo, file, received, stop)
        if stop.is_set():
            return
        link(hub_repo, file)
    require_as_read(hub_repo, file, path)


def _download_from_xet(hub_repo: HubRepo, file: SourceFile, received: ByteCounter) -> bool:
    """Let huggingface_hub download a file; it compares sizes, and names a blob by its ETag.

    Returns whether it is the file that the Hub lists; else the repo does not have it in the cache.
    The store that repos share may keep it: huggingface_hub does not compare what it finds there.
    """
    before = FILE_BYTES.set(file.size_bytes)
    try:
        path = retry(lambda: _through_cache(hub_repo, file.path, received.add))
    finally:
        FILE_BYTES.reset(before)
    blob = blob_path(hub_repo.name, hub_repo.repo_type, file)
    named = blob.with_name(path.readlink().name) if path.is_symlink() else blob
    is_listed = (path, named) == (snapshot_path(hub_repo, file), blob)
    if is_listed and digest_of(path, file) == file.digest:
        return True
    path.unlink()
    kind = "sha256" if len(named.name) == SHA256_LETTERS else "git-sha1"
    stated = replace(file, digest=f"{kind}:{named.name}")
    if named.exists() and not has_digest(named, stated):
        named.unlink()
    return False


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

    A blob with other bytes, of another program or a disk, is replaced.

    Raises:
        SourceError: the bytes do not have the digest that the Hub lists, at the second try too.
    """
    blob = blob_path(hub_repo.name, hub_repo.repo_type, file)
    part = partial_path(blob)
    lock = cache_root() / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"  # the client's
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists() and has_digest(blob, file):
            return
        for _ in range(2):
            if stop.is_set():
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
    with request_range(hub_repo.file_url(file.path), start, token=hub_repo.api.token) as found:
        pieces = pieces_of(found, start, file.size_bytes, file.size_bytes)
        with part.open("ab") as out:
            for piece in pieces:
                out.write(piece)
                received.add(len(piece))
                if stop.is_set():
                    return


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
