"""LoRA adapters as experts: what their files say, and what a user should know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.adapter import adapt, own_tensors
from lewis_hub.checkpoint.adapter_config import AdapterConfig, read_config
from lewis_hub.checkpoint.header import TensorHeader, read_header
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.remote import read_range
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.recipe import Recipe
from lewis_hub.stages.sources import Inputs

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Adapter:
    """An adapter on the recipe's base.

    Attributes:
        checkpoint: all tensors of the base, those that the adapter changes in float32.
    """

    config: AdapterConfig
    checkpoint: Checkpoint

    @property
    def own(self) -> tuple[TensorHeader, ...]:
        """What its file holds."""
        return own_tensors(self.checkpoint)


def open_adapter(api: HfApi, source: Source, base: Checkpoint) -> Adapter:
    """Read an adapter's configuration and header: by byte ranges where it is a repo.

    Raises:
        AdapterError: it cannot be put on the base, or asks for what is not computed here.
        BrokenCheckpointError: its file is broken.
    """
    settings, weights = ADAPTERS
    told = read_small(api, source, settings)
    file = source.file(weights)
    assert told is not None  # an adapter has both files
    assert file
    config = read_config(f"{source.pinned}: {settings}", told)
    stored = read_header(
        source.pinned,
        weights,
        file.size_bytes,
        lambda path, start, stop: read_range(api, source, path, start, stop),
    )
    return Adapter(config, adapt(source.pinned, base, stored, config))


def adapter_notes(
    recipe: Recipe, inputs: Inputs, adapters: Mapping[str, Adapter], *, tied: bool
) -> list[str]:
    """What may make an adapter something else than it was in training.

    Args:
        recipe: knows where local folders lie.
        inputs: pinned.
        adapters: by pinned source; those that are not there say nothing yet.
        tied: whether the base's embeddings are its head as well.
    """
    notes = []
    for source in inputs.adapters:
        if source.pinned not in adapters:
            continue
        adapter, base = adapters[source.pinned], inputs.base
        assert base  # an adapter without one does not resolve
        trained_on = adapter.config.base_model_name_or_path
        if trained_on and not _is(recipe, base, trained_on):
            notes.append(
                f"{source.name} was trained on {trained_on!r} and is put on {base.name}: every "
                "tensor fits, but a task vector means most on the model that it was learnt on."
            )
        changed = (t.name for t in adapter.checkpoint.tensors.values() if t.adapted)
        embeddings = [name for name in changed if names.is_input_side(name)]
        if embeddings and tied:
            notes.append(
                f"{source.name} changes {embeddings[0]}, which is the head of {base.name} as well: "
                "the merged head changes with it, as it does in peft's `merge_and_unload`."
            )
    return notes


def _is(recipe: Recipe, base: Source, name: str) -> bool:
    """Whether a name in an adapter's configuration is the base's, or that of the same folder."""
    if base.folder:
        return Path(recipe.locate(name)).resolve() == base.folder.resolve()
    return name == base.name
