"""Fetch: the small files first, so that what is wrong shows before the weights are pulled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.files import existing, require_room
from lewis_hub.hub.cache import cache_root
from lewis_hub.hub.fetch import CODE_FILES, SIDECAR_FILES, bytes_to_download, fetch
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.stages.execution import Step


def small_files(api: HfApi, source: Source) -> Path:
    """Fetch configuration and tokenizer; returns the folder that holds them."""
    return fetch(api, source, lambda _: None, only=SIDECAR_FILES)


def require_disk(step: Step, work: Path) -> None:
    """Refuse before the first byte what the disks cannot hold: sources, merge and twin together.

    Args:
        step: of a merge that was examined.
        work: folder that the merge is made in; what an earlier run left there counts as free.

    Raises:
        OutputError: a disk is too small.
    """
    report = step.examined.report
    left = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needs = ((cache_root(), report.download_bytes), (work, max(0, report.disk_bytes - left)))
    of_disk: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, n_bytes in needs:
        of_disk[existing(folder).stat().st_dev].append((folder, n_bytes))
    for shares in of_disk.values():
        needed = sum(n_bytes for _, n_bytes in shares)
        where = " and ".join(str(folder) for folder, _ in shares)
        remedy = "take another disk: HF_HUB_CACHE names the folder for the download, -o that for "
        require_room(shares[0][0], needed, "download and merge", f"{remedy}the merge", where)


def everything(step: Step) -> dict[str, Path]:
    """Fetch all sources of a merge; returns pinned source -> folder with its files."""
    folders = download(step.api, step.inputs.models, step.progress)
    if step.inputs.donor.name in step.recipe.allow_code:
        fetch(step.api, step.inputs.donor, lambda _: None, only=CODE_FILES)
    return folders


def download(api: HfApi, sources: Sequence[Source], progress: Progress) -> dict[str, Path]:
    """Fetch sources, weights included; what is in the cache already is not fetched again."""
    total = sum(bytes_to_download(api, source) for source in sources)
    with progress.stage("Downloading", total, "bytes") as advance:
        return {source.pinned: fetch(api, source, advance) for source in sources}
