"""Sources that transformers cannot load as they are, written out so that it can."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.guides import registry
from lewis_hub.hub.source import Source
from lewis_hub.merge.planning import MergeSettings, MergeSource, make_plan
from lewis_hub.merge.sidecars import write_sidecars
from lewis_hub.recipe import Recipe
from lewis_hub.stages.merging import new_dtype, write_weights
from lewis_hub.stages.sources import Inputs, needs_grams

if TYPE_CHECKING:
    from lewis_hub.stages.execution import Folders, Step


def loadable(step: Step, source: Source, folders: Folders, scratch: Path) -> Path:
    """A folder of a source that transformers can load.

    Its own, where its files hold it as it is merged. An adapter's expert is written out in
    `scratch`, in the dtypes of its base, and so is a model of 8-bit floats, in bfloat16: what
    transformers runs 8-bit floats with needs a GPU, and what measures looks at plain weights.
    What an earlier call or run wrote there is kept.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room.
    """
    checkpoint = step.examined.checkpoints[source.pinned]
    if not checkpoint.is_computed:
        return folders[source.pinned]
    expert = MergeSource(checkpoint, step.inputs.content(source))
    alone = make_plan(MergeSettings("linear", None, (expert,)), step.execution.max_shard_bytes)
    output = configured(step, source, folders, scratch)
    as_what = "on its base" if source.is_adapter else "in bfloat16"
    means = step.execution.means(is_read_next=True)
    write_weights(step, alone, folders, output, f"Writing out {source.name} {as_what}", means)
    return output


def configured(step: Step, source: Source, folders: Folders, scratch: Path) -> Path:
    """A folder in `scratch` with the configuration of a source that is written out."""
    checkpoint = step.examined.checkpoints[source.pinned]
    output = scratch / "written out" / str(step.inputs.models.index(source))
    output.mkdir(parents=True, exist_ok=True)
    beside = folders[checkpoint.base or source.pinned]
    write_sidecars(beside, output, new_dtype(checkpoint), code=False)
    return output


def loaded(recipe: Recipe, inputs: Inputs) -> tuple[Source, ...]:
    """The sources that are measured or scored, for which each must be loaded as a whole."""
    if recipe.guide and registry.find(recipe.guide.name).needs_texts:
        return inputs.models
    gathered = inputs.experts if needs_grams(recipe) else ()
    compared = recipe.evaluate.compare if recipe.evaluate else ()
    base = (inputs.base,) if inputs.base and "base" in compared else ()
    return (*base, *(inputs.experts if "experts" in compared else gathered))
