"""Plan and merge: headers, settings and a schedule to a model on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides import registry
from lewis_hub.guides.density import DensitySchedule, ExpertSchedule
from lewis_hub.hub.source import Source
from lewis_hub.merge.alignment import Alignment, shape
from lewis_hub.merge.engine import ShardResult, run
from lewis_hub.merge.plan import MergePlan, MergeSettings, MergeSource, Schedule, make_plan
from lewis_hub.merge.sidecars import TokenizerFiles, write_sidecars
from lewis_hub.merge.slices import make_stacked_plan
from lewis_hub.merge.statistics import Statistics, informed
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_settings import Settings
from lewis_hub.stages.slicing import configuration, stack
from lewis_hub.stages.sources import Inputs, merged_entries, needs_grams

if TYPE_CHECKING:
    from lewis_hub.stages.execution import Folders, Step
    from lewis_hub.stages.tokenizers import Carried


@dataclass(frozen=True)
class MergedModel:
    """A model on disk.

    Attributes:
        identity: digest of its plan: equal ones hold equal weights.
        shards: file of weights -> SHA-256 in hexadecimal; the index is among them.
        sidecars: paths of the files beside the weights, relative to `folder`.
        parameters: tensor -> number of parameters.
    """

    identity: str
    folder: Path
    shards: Mapping[str, str]
    sidecars: tuple[str, ...]
    parameters: Mapping[str, int]


def plan(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    alignment: Alignment | None,
    schedule: DensitySchedule | None,
    max_shard_bytes: int,
) -> MergePlan:
    """Say what each output tensor is made of.

    Args:
        recipe: names method and settings.
        inputs: pinned.
        checkpoints: pinned source -> its headers.
        alignment: of vocabularies that differ.
        schedule: None where the settings alone decide.
        max_shard_bytes: largest file.

    Raises:
        MergeError: the settings do not fit the method or the sources.
    """
    if recipe.slices:
        return make_stacked_plan(stack(recipe, inputs, checkpoints), max_shard_bytes)

    def source(pinned: Source, parameters: Settings) -> MergeSource:
        content = inputs.content(pinned)
        return MergeSource(checkpoints[pinned.pinned], content, parameters)

    entries = merged_entries(recipe)
    scheduled = {one.source: one for one in schedule.experts} if schedule else {}
    settings = MergeSettings(
        method=recipe.merge_method,
        base=source(inputs.base, {}) if inputs.base else None,
        experts=tuple(
            _weighted(source(expert, entry.parameters), scheduled.get(expert.pinned))
            for expert, entry in zip(inputs.experts, entries, strict=True)
        ),
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        seed=recipe.seed,
        missing=recipe.missing,
        alignment=alignment,
    )
    return make_plan(settings, max_shard_bytes, _densities(schedule, checkpoints))


def _weighted(expert: MergeSource, scheduled: ExpertSchedule | None) -> MergeSource:
    return replace(expert, weights=scheduled.weights) if scheduled else expert


def make(
    step: Step,
    schedule: DensitySchedule | None,
    folders: Folders,
    output: Path,
    title: str,
    statistics: Sequence[Statistics] = (),
) -> MergedModel:
    """Merge into a folder; shards that an earlier run finished are kept.

    Args:
        step: what is merged, and how it runs.
        schedule: None where the settings alone decide.
        folders: of all sources, and of the statistics.
        output: made if it is not there.
        title: what the stage is called.
        statistics: one an expert, where the method merges by them.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room.
    """
    recipe, execution, examined = step.recipe, step.execution, step.examined
    planned = plan(
        recipe,
        step.inputs,
        examined.checkpoints,
        examined.tokens.alignment,
        schedule,
        execution.max_shard_bytes,
    )
    planned = informed(planned, statistics)
    found = _write(step, planned, folders, output, title)
    donor = step.inputs.donor
    dtype = recipe.output_dtype or _new_dtype(step.examined.checkpoints[donor.pinned])
    sidecars = write_sidecars(
        folders[donor.pinned],
        output,
        dtype,
        code=donor.name in recipe.allow_code,
        tokenizer=_tokenizer_files(examined.tokens.carried, folders),
        config=_stacked_config(step, folders) if recipe.slices else None,
    )
    shards = {name: result.sha256 for name, result in found.items()}
    tensors = [tensor for shard in planned.shards for tensor in shard.tensors]
    parameters = {tensor.output.name: tensor.output.n_elements for tensor in tensors}
    return MergedModel(planned.digest, output, shards, sidecars, parameters)


def _stacked_config(step: Step, folders: Folders) -> dict[str, Any]:
    inputs = step.inputs
    configs = {}
    for source in inputs.models:
        owner = inputs.donor if source.is_adapter else source
        text = (folders[owner.pinned] / "config.json").read_text(encoding="utf-8")
        configs[source.pinned] = json.loads(text)
    return configuration(step.recipe, inputs, step.examined.checkpoints, configs)


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
    output = scratch / "written out" / str(step.inputs.models.index(source))
    as_what = "on its base" if source.is_adapter else "in bfloat16"
    _write(step, alone, folders, output, f"Writing out {source.name} {as_what}")
    beside = folders[checkpoint.base or source.pinned]
    write_sidecars(beside, output, _new_dtype(checkpoint), code=False)
    return output


def loaded(recipe: Recipe, inputs: Inputs) -> tuple[Source, ...]:
    """The sources that are measured or scored, for which each must be loaded as a whole."""
    if recipe.guide and registry.find(recipe.guide.name).needs_texts:
        return inputs.models
    gathered = inputs.experts if needs_grams(recipe) else ()
    compared = recipe.evaluate.compare if recipe.evaluate else ()
    base = (inputs.base,) if inputs.base and "base" in compared else ()
    return (*base, *(inputs.experts if "experts" in compared else gathered))


def _new_dtype(checkpoint: Checkpoint) -> str | None:
    """What a configuration has to say of a model that keeps its dtypes; None: what it said."""
    holds_eight_bit = any(
        (tensor.adapted.base if tensor.adapted else tensor).scaled
        for tensor in checkpoint.tensors.values()
    )
    return "bfloat16" if holds_eight_bit else None


def _write(
    step: Step, planned: MergePlan, folders: Folders, output: Path, title: str
) -> dict[str, ShardResult]:
    output.mkdir(parents=True, exist_ok=True)
    execution = step.execution
    device = execution.device if execution.device.startswith("cuda") else None
    planned = planned.allowing_nan if execution.allow_nan else planned
    with step.progress.stage(title, planned.n_bytes, "bytes") as advance:
        found = run(planned, folders, output, execution.workers, advance, device)
    mended = Counter[str]()
    for result in found.values():
        mended.update(result.mended)
    for label, n_tensors in mended.items():
        step.progress.say(
            f"{n_tensors} tensors of {label} hold NaN or infinity, which counts as the base's."
        )
    return found


def _tokenizer_files(carried: Carried | None, folders: Folders) -> TokenizerFiles | None:
    if carried is None:
        return None
    return TokenizerFiles(
        folders[carried.donor],
        carried.written,
        carried.dropped,
        carried.config,
        carried.generation,
    )


def sizes(step: Step) -> dict[str, int]:
    """The number of elements of each tensor of the merge."""
    tensors = step.examined.checkpoints[step.inputs.donor.pinned].tensors
    alignment = step.examined.tokens.alignment
    return {name: prod(shape(alignment, tensor)) for name, tensor in tensors.items()}


def uniform_twin(step: Step, schedule: DensitySchedule) -> DensitySchedule:
    """The same schedule with every density replaced by its mean: what guidance must beat."""
    return schedule.uniform_twin(sizes(step))


def _densities(
    schedule: DensitySchedule | None, checkpoints: Mapping[str, Checkpoint]
) -> Schedule | None:
    """Every tensor's density, those that the guide leaves alone included; none of weights alone."""
    if schedule is None:
        return None
    return {
        expert.source: {name: expert.density(name) for name in checkpoints[expert.source].tensors}
        for expert in schedule.experts
        if expert.tensors
    }
