"""Convert: pickled weights to safetensors, once all is checked that can be without them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.pickles import convert
from lewis_hub.hub import converted
from lewis_hub.hub.fetch import CODE_FILES, fetch, read_small, weight_files
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Recipe
from lewis_hub.workflow.check import examine, require_fine
from lewis_hub.workflow.fetch import download
from lewis_hub.workflow.open import ties
from lewis_hub.workflow.resolve import Inputs

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def without_pickles(recipe: Recipe, inputs: Inputs, api: HfApi, progress: Progress) -> Inputs:
    """The same inputs with safetensors in the place of pickles.

    Args:
        recipe: what is asked.
        inputs: pinned; resolved with pickles allowed where there are any.
        api: the Hub.
        progress: told the bytes that arrive and that are written.

    Raises:
        CheckFailedError: something else stands in the way.
        SourceError: a file cannot be had, or there is not enough room.
        PickleError: a pickle asks for more than tensors, or is damaged.
    """
    pickled = tuple(dict.fromkeys(source for source in inputs.models if source.is_pickled))
    if not pickled:
        return inputs
    require_fine(examine(recipe, inputs, api, allow_code=True).report)
    folders = download(api, pickled, progress)
    found = {source: _converted(recipe, source, folders, api, progress) for source in pickled}
    base = found.get(inputs.base, inputs.base) if inputs.base else None
    experts = tuple(found.get(expert, expert) for expert in inputs.experts)
    return replace(inputs, base=base, experts=experts)


def _converted(
    recipe: Recipe, source: Source, folders: dict[str, Path], api: HfApi, progress: Progress
) -> Source:
    code, folder = source.name in recipe.allow_code, folders[source.pinned]
    if code:
        fetch(api, source, lambda _: None, only=CODE_FILES)
    config = json.loads(read_small(api, source, "config.json") or b"{}")
    files = {path: folder / path for path in converted.pickles_of(source)}
    work = converted.begin_conversion(source, folder, code=code)
    try:
        total = source.size_bytes(weight_files(source))
        with progress.stage(f"Converting {source.name}", total, "bytes") as advance:
            written = convert(source.pinned, files, work, advance, ties=ties(config))
        told = [SourceFile(one.name, one.n_bytes, f"sha256:{one.sha256}") for one in written]
        converted.finish_conversion(source, work, told, code=code)
    finally:
        converted.abandon_conversion(work)
    return converted.with_converted(source, code=code)
