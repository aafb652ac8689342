"""Fetch: the small files first, so that what is wrong shows before the weights are pulled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.hub.fetch import CODE_FILES, SIDECAR_FILES, bytes_to_download, fetch
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.stages.execution import Step


def small_files(api: HfApi, source: Source) -> Path:
    """Fetch configuration and tokenizer; returns the folder that holds them."""
    return fetch(api, source, lambda _: None, only=SIDECAR_FILES)


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
