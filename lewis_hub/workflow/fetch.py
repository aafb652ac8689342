"""Fetch sources: small files, whole models or byte ranges; convert pickled weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.pickles import convert
from lewis_hub.checkpoint.ranges import Location, Locations
from lewis_hub.files import existing, require_room
from lewis_hub.hub import converted
from lewis_hub.hub.cache import cache_root
from lewis_hub.hub.fetch import (
    CODE_FILES,
    SIDECAR_FILES,
    bytes_to_download,
    fetch,
    read_small,
    weight_files,
)
from lewis_hub.hub.ranges import ByteCounter, RemoteFiles
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.progress import Progress
from lewis_hub.workflow.open import ties

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Folders = Mapping[str, Path]  # pinned source -> a folder with at least its small files


@dataclass(frozen=True)
class FetchedSources:
    """The files of sources.

    Attributes:
        folders: pinned source -> folder with at least its configuration and tokenizer.
        locations: pinned source -> folder of its weights, or function that reads byte ranges.
        keeps_models: whether whole models may be on this disk; otherwise byte ranges are read.
        count_bytes: returns the number of bytes that were read by ranges.
    """

    folders: Folders
    locations: Locations
    keeps_models: bool
    count_bytes: Callable[[], int] | None = None


def small_files(api: HfApi, source: Source) -> Path:
    """Fetch configuration and tokenizer; return their folder."""
    return fetch(api, source, lambda _: None, only=SIDECAR_FILES)


def code_files(api: HfApi, sources: Sequence[Source]) -> None:
    """Fetch the Python files of sources."""
    for source in sources:
        fetch(api, source, lambda _: None, only=CODE_FILES)


def download(api: HfApi, sources: Sequence[Source], progress: Progress) -> dict[str, Path]:
    """Download whole sources that are not in the cache; return pinned source -> folder."""
    total = sum(bytes_to_download(api, source) for source in sources)
    with progress.stage("Downloading", total, "bytes") as advance:
        return {source.pinned: fetch(api, source, advance) for source in sources}


def fetch_whole(api: HfApi, sources: Sequence[Source], progress: Progress) -> FetchedSources:
    """Download whole sources."""
    folders = download(api, sources, progress)
    return FetchedSources(folders, folders, keeps_models=True)


def open_ranges(api: HfApi, sources: Sequence[Source]) -> FetchedSources:
    """Fetch small files; weights that are not in the cache are read by byte ranges."""
    folders: dict[str, Path] = {}
    locations: dict[str, Location] = {}
    counts: list[ByteCounter] = []
    for source in dict.fromkeys(sources):
        folders[source.pinned] = small_files(api, source)
        if bytes_to_download(api, source) == 0:
            locations[source.pinned] = fetch(api, source, lambda _: None)
        else:
            files = RemoteFiles(source, api.endpoint)
            locations[source.pinned] = files.fetch
            counts.append(files.received)
    return FetchedSources(
        folders,
        locations,
        keeps_models=False,
        count_bytes=lambda: sum(one.n_bytes for one in counts),
    )


def require_disk(work: Path, download_bytes: int, made_bytes: int) -> None:
    """Refuse disks that cannot hold the download and the written files together.

    Args:
        work: folder of the merge; files of an earlier run in it count as free.
        download_bytes: size of the sources that are not in the cache.
        made_bytes: size of the files that are written into `work`.

    Raises:
        OutputError: a disk is too small.
    """
    left = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needs = ((cache_root(), download_bytes), (work, max(0, made_bytes - left)))
    of_disk: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, n_bytes in needs:
        of_disk[existing(folder).stat().st_dev].append((folder, n_bytes))
    for shares in of_disk.values():
        needed = sum(n_bytes for _, n_bytes in shares)
        where = " and ".join(str(folder) for folder, _ in shares)
        remedy = "use another disk: HF_HUB_CACHE names the folder for the download, -o that for "
        require_room(shares[0][0], needed, "download and merge", f"{remedy}the merge", where)


def convert_pickles(
    sources: Sequence[Source], code: Collection[str], api: HfApi, progress: Progress
) -> dict[Source, Source]:
    """Download pickled weights and convert them to safetensors; return source -> converted source.

    `code` names the sources whose Python files are copied.

    Raises:
        SourceError: a file cannot be fetched, or there is not enough room.
        PickleError: a pickle loads something else than tensors, or is damaged.
    """
    folders = download(api, sources, progress)
    return {
        source: _converted(source, folders[source.pinned], api, progress, code=source.name in code)
        for source in sources
    }


def _converted(
    source: Source, folder: Path, api: HfApi, progress: Progress, *, code: bool
) -> Source:
    if code:
        code_files(api, [source])
    config = json.loads(read_small(api, source, "config.json") or b"{}")
    files = {path: folder / path for path in converted.pickles_of(source)}
    work = converted.begin_conversion(source, folder, code=code)
    try:
        total = source.size_bytes(weight_files(source))
        with progress.stage(f"Converting {source.name}", total, "bytes") as advance:
            written = convert(source.pinned, files, work, advance, ties=ties(config))
        files_made = [SourceFile(f.name, f.n_bytes, f"sha256:{f.sha256}") for f in written]
        converted.finish_conversion(source, work, files_made, code=code)
    finally:
        converted.abandon_conversion(work)
    return converted.with_converted(source, code=code)
