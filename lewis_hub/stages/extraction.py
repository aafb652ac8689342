"""Extract: a fine-tuned model and its base to a LoRA adapter, which a merge can take back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.header import MERGEABLE
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader
from lewis_hub.errors import ExtractionError
from lewis_hub.hub.facts import model_facts
from lewis_hub.hub.source import Source
from lewis_hub.merge.compare import compare
from lewis_hub.merge.workspace import open_workspace
from lewis_hub.progress import Progress
from lewis_hub.recipe import ModelReference
from lewis_hub.report.adapter_card import adapter_card
from lewis_hub.stages.downloading import download
from lewis_hub.stages.fitting import settle
from lewis_hub.stages.opening import Opened, open_model
from lewis_hub.stages.sources import resolve_one

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.merge.extract import Extracted

CARD = "README.md"


def extract_adapter(  # noqa: PLR0913
    expert: ModelReference,
    base: ModelReference,
    most: int | None,
    error: float,
    output: Path,
    api: HfApi,
    progress: Progress,
) -> Extracted:
    """Write an adapter in PEFT's form; the folder appears whole or not at all.

    Args:
        expert: the fine-tuned model.
        base: what it was fine-tuned from.
        most: highest rank of a module's update; None: as high as it takes.
        error: per module, the lowest rank that misses no more than this share of the task vector
            is taken; 0 takes the highest rank everywhere.
        output: folder to make.
        api: the Hub.
        progress: told the parameters that were looked at.

    Raises:
        LewisHubError: a model cannot be used, they do not fit, or are equal.
    """
    from lewis_hub.merge.extract import extract
    from lewis_hub.merge.scaled import ScaledReader

    sources = [resolve_one(base, api), resolve_one(expert, api)]
    models = [open_model(api, source) for source in sources]
    headers = _fitting(sources, models)
    with open_workspace(output, replace=False) as work, ExitStack() as opened:
        folders = download(api, sources, progress)
        readers = [
            opened.enter_context(ScaledReader(TensorReader(folders[source.pinned], source.pinned)))
            for source in sources
        ]
        tensors = headers[0].tensors.values()
        n_elements = sum(t.n_elements for t in tensors if t.dtype in MERGEABLE)
        pairs = list(zip(headers, readers, strict=True))
        with progress.stage("Extracting", n_elements, "items") as advance:
            found = extract(pairs[0], pairs[1], most, error, work.folder, advance)
        licence = model_facts(api, sources[1]).licence
        card = adapter_card(sources[0], sources[1], licence, found)
        (work.folder / CARD).write_text(card, encoding="utf-8")
        work.finish((CARD, *found.files))
    return found


def _fitting(sources: Sequence[Source], models: Sequence[Opened]) -> list[Checkpoint]:
    """The headers of base and expert, where one can be held against the other."""
    if refused := [model.problem for model in models if model.problem]:
        raise ExtractionError(tuple(refused))
    named = list(zip((source.pinned for source in sources), models, strict=True))
    checkpoints = {pinned: model.checkpoint for pinned, model in named}
    configs = {pinned: model.config for pinned, model in named}
    settled = settle(sources[0].pinned, checkpoints, configs)
    base, expert = (settled[source.pinned] for source in sources)
    if misfits := compare(base, [expert]):
        remedy = "Name the base that it was fine-tuned from."
        raise ExtractionError(tuple(f"{m.source} {m.problem}. {remedy}" for m in misfits))
    return [base, expert]
