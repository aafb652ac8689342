"""Fetch: the small files first, so that what is wrong shows before the weights are pulled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.meta_model import FEWER, STATES
from lewis_hub.errors import OutputError
from lewis_hub.files import existing, require_room
from lewis_hub.hub.cache import cache_root
from lewis_hub.hub.fetch import CODE_FILES, SIDECAR_FILES, bytes_to_download, fetch
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress
from lewis_hub.workflow.memory import Loading, on_disk_bytes
from lewis_hub.workflow.resolve import calibrations

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.calibration.measure import CalibrationSet
    from lewis_hub.workflow.job import Step


def small_files(api: HfApi, source: Source) -> Path:
    """Fetch configuration and tokenizer; returns the folder that holds them."""
    return fetch(api, source, lambda _: None, only=SIDECAR_FILES)


def require_disk(step: Step, work: Path, sets: Sequence[CalibrationSet] = ()) -> None:
    """Refuse before the first byte what the disks cannot hold: sources, merge and twin together.

    Args:
        step: of a merge that was examined.
        work: folder that the merge is made in; what an earlier run left there counts as free.
        sets: of calibration texts, one an expert; none where they are not drawn yet.

    Raises:
        OutputError: a disk is too small.
    """
    report = step.examined.report
    left = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    made = report.disk_bytes - report.states_bytes + _waiting_bytes(step, sets)
    needs = ((cache_root(), report.download_bytes), (work, max(0, made - left)))
    of_disk: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, n_bytes in needs:
        of_disk[existing(folder).stat().st_dev].append((folder, n_bytes))
    for shares in of_disk.values():
        needed = sum(n_bytes for _, n_bytes in shares)
        where = " and ".join(str(folder) for folder, _ in shares)
        remedy = "take another disk: HF_HUB_CACHE names the folder for the download, -o that for "
        require_room(shares[0][0], needed, "download and merge", f"{remedy}the merge", where)


def shortages(step: Step, work: Path) -> tuple[str, ...]:
    """What `require_disk` refuses here, for a merge that may be made elsewhere."""
    try:
        require_disk(step, work)
    except OutputError as error:
        told = "A merge on this machine is refused before the download, but with `--stream`."
        return (f"{error.path}: {error.problem} {told}",)
    return ()


def require_room_for_texts(step: Step, sets: Sequence[CalibrationSet], scratch: Path) -> None:
    """Refuse, before a weight is read, texts of which a disk cannot hold the hidden states.

    Raises:
        OutputError: it is too small.
    """
    if n_bytes := _waiting_bytes(step, sets):
        require_room(scratch, n_bytes, STATES, FEWER)


def _waiting_bytes(step: Step, sets: Sequence[CalibrationSet]) -> int:
    """Of hidden states on the disk, now that the texts are known; in a stream all go by block."""
    asked = calibrations(step.recipe) if sets else ()
    n_tokens = {one: own.tokens.n_tokens for one, own in zip(asked, sets, strict=True)}
    loading = Loading(max_memory_bytes=0) if step.places else step.execution.loading
    return on_disk_bytes(step.recipe, n_tokens, step.examined.checkpoints.values(), loading)


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
