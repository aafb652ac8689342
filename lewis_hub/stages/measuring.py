"""Measure one model that no recipe speaks of: its importance on a dataset or task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.reader import Checkpoint, local_checkpoint
from lewis_hub.errors import CalibrationModelError
from lewis_hub.files import require_room, require_writable, write_whole
from lewis_hub.guides.calibrate import CalibrationSet, Subject, calibrate, missing
from lewis_hub.guides.importance import ImportanceProfile
from lewis_hub.guides.registry import Measure
from lewis_hub.guides.weights import FEWER, HELD_BYTES, STATES
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress
from lewis_hub.recipe import ModelReference
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.report.plots import draw as draw_plots
from lewis_hub.stages.bringing import in_memory
from lewis_hub.stages.calibration import known_profile
from lewis_hub.stages.downloading import download
from lewis_hub.stages.drawing import Drawing, draw
from lewis_hub.stages.execution import Execution
from lewis_hub.stages.loading import ALLOW, EVEN_SO, Loading, blocks_bytes, states_bytes
from lewis_hub.stages.opening import open_model
from lewis_hub.stages.profiles import PROFILE
from lewis_hub.stages.sources import hub_api, named_dataset, resolve_one
from lewis_hub.stages.task_data import PinnedTask, pin_task

if TYPE_CHECKING:
    from huggingface_hub import HfApi

GUIDE: Measure = "lewis"


def measure_model(
    model: ModelReference,
    calibration: Calibration,
    seed: int,
    output: Path,
    execution: Execution,
    progress: Progress,
) -> ImportanceProfile:
    """Write `importance.json` and its plot; what `output` holds of this measurement is reused.

    Args:
        model: a repo, repo@revision or folder.
        calibration: its relative paths are looked up in the working folder.
        seed: draws the texts.
        output: folder to write into.
        execution: device, and whether tasks may run code.
        progress: told how far it is.

    Raises:
        LewisHubError: the model or the data cannot be used.
    """
    execution.require_usable()
    require_writable(output)
    api = hub_api()
    source = resolve_one(model, api)
    how = Drawing(api, source, seed, execution.allow_code)
    drawn = draw(how, calibration, _data(api, calibration), progress)
    tokens = drawn.tokens.measured(GUIDE)
    _require_fits(source, open_model(api, source).checkpoint, tokens, output, execution.loading)
    folder = download(api, [source], progress)[source.pinned]
    subject = Subject(source.pinned, source.commit_sha, "expert", folder, (tokens,))
    checkpoint = local_checkpoint(source.pinned, folder)
    subject = in_memory(subject, checkpoint, execution.loading, output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / PROFILE
    told = calibration.model_dump(mode="json", exclude_none=True)
    before = known_profile(file)
    known = ImportanceProfile(GUIDE, told, before.sources if before else ())
    n_tokens = sum(one.n_tokens for one in missing([subject], known))
    with progress.stage("Calibrating", n_tokens, "tokens") as advance:
        profile = calibrate([subject], known, execution.device, advance, lambda _: None)
    write_whole(file, profile.to_json())
    draw_plots(profile, None, output)
    return profile


def _require_fits(
    source: Source, checkpoint: Checkpoint, tokens: CalibrationSet, output: Path, loading: Loading
) -> None:
    """Refuse, before a weight is downloaded, what neither memory nor disk has room for."""
    if not loading.has_room_for_blocks(checkpoint):
        problem = f"block by block it takes {blocks_bytes(checkpoint):,} bytes in memory, {EVEN_SO}"
        raise CalibrationModelError(source.name, problem, ALLOW)
    n_tokens = tokens.tokens.n_tokens
    by_block = loading.is_by_block(checkpoint) or loading.is_less_by_block(checkpoint, n_tokens)
    n_bytes = states_bytes(checkpoint, n_tokens)
    if by_block and n_bytes > HELD_BYTES:
        require_room(output, n_bytes, STATES, FEWER)


def _data(api: HfApi, calibration: Calibration) -> Source | PinnedTask:
    written = calibration.dataset
    if written is None:
        include = Path(calibration.include).resolve() if calibration.include else None
        return pin_task(api, calibration, include)
    path = Path(written).expanduser()
    if path.exists():
        return replace(resolve_dataset(api, str(path.resolve())), name=written)
    return named_dataset(api, written)
