"""Plan and merge: headers, settings and a schedule to a model on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides import registry
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.hub.source import Source
from lewis_hub.merge.alignment import Alignment, shape
from lewis_hub.merge.engine import ShardResult, run
from lewis_hub.merge.in_memory import held_tensors
from lewis_hub.merge.plan import Known, MergePlan, informed
from lewis_hub.merge.planning import MergeSettings, MergeSource, Schedule, make_plan
from lewis_hub.merge.runners import Means, Ray, threads
from lewis_hub.merge.sidecars import TokenizerFiles, write_sidecars
from lewis_hub.merge.slices import make_stacked_plan
from lewis_hub.recipe.schema import Recipe, Settings
from lewis_hub.workflow.resolve import Inputs, merged_entries, needs_grams
from lewis_hub.workflow.slices import configuration, stack

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.workflow.job import Folders, Step
    from lewis_hub.workflow.tokenizers import Carried


@dataclass(frozen=True)
class MergedModel:
    """A model that was made.

    Attributes:
        identity: digest of its plan: equal ones hold equal weights.
        shards: by the names of their files; the index is among them. Of a stream they are on the
            Hub and not in `folder`.
        sidecars: paths of the files beside the weights, relative to `folder`.
        parameters: tensor -> number of parameters.
    """

    identity: str
    folder: Path
    shards: Mapping[str, ShardResult]
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
        stacked = stack(recipe, inputs, checkpoints, alignment)
        names = _output_sizes(make_stacked_plan(stacked, max_shard_bytes)) if schedule else {}
        return make_stacked_plan(stacked, max_shard_bytes, _densities(schedule, lambda _: names))

    def source(pinned: Source, parameters: Settings) -> MergeSource:
        content = inputs.content(pinned)
        return MergeSource(checkpoints[pinned.pinned], content, parameters)

    entries = merged_entries(recipe)
    guided = {one.source: one for one in schedule.experts} if schedule else {}
    settings = MergeSettings(
        method=recipe.merge_method,
        base=source(inputs.base, {}) if inputs.base else None,
        experts=tuple(
            _weighted(source(expert, entry.parameters), guided.get(expert.pinned))
            for expert, entry in zip(inputs.experts, entries, strict=True)
        ),
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        seed=recipe.seed,
        missing=recipe.missing,
        alignment=alignment,
    )
    scheduled = _densities(schedule, lambda label: checkpoints[label].tensors)
    return make_plan(settings, max_shard_bytes, scheduled)


def _weighted(expert: MergeSource, scheduled: ExpertSchedule | None) -> MergeSource:
    return replace(expert, weights=scheduled.weights) if scheduled else expert


def make(
    step: Step,
    schedule: DensitySchedule | None,
    folders: Folders,
    output: Path,
    title: str,
    statistics: Known = (),
) -> MergedModel:
    """Merge into a folder; shards that an earlier run finished are kept.

    Args:
        step: what is merged, and how it runs.
        schedule: None where the settings alone decide.
        folders: of all sources, and of the statistics.
        output: made if it is not there.
        title: what the stage is called.
        statistics: where the method merges by them.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room.
    """
    planned = informed(plan_of(step, schedule), statistics)
    means = step.execution.means(is_read_next=step.recipe.evaluate is not None)
    found = write_weights(step, planned, folders, output, title, means)
    return beside(step, planned, found, folders, output)


def make_in_memory(
    step: Step,
    schedule: DensitySchedule | None,
    folders: Folders,
    statistics: Known,
    scratch: Path,
) -> dict[str, Tensor]:
    """The tensors that `make` would write, on this machine; nothing but them is made.

    Args:
        step: what is merged, and how it runs.
        schedule: None where the settings alone decide.
        folders: of all sources, and of the statistics.
        statistics: where the method merges by them.
        scratch: folder.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
    """
    planned = _as_made(step, informed(plan_of(step, schedule), statistics))
    means = step.execution.means(is_read_next=True)
    if isinstance(means.runner, Ray):
        means = replace(means, runner=threads())
    return held_tensors(planned, folders, scratch, means)


def plan_of(step: Step, schedule: DensitySchedule | None) -> MergePlan:
    """The plan of a merge that was examined; None where the settings alone decide."""
    examined = step.examined
    alignment, n_bytes = examined.tokens.alignment, step.execution.max_shard_bytes
    return plan(step.recipe, step.inputs, examined.checkpoints, alignment, schedule, n_bytes)


def beside(
    step: Step,
    planned: MergePlan,
    found: Mapping[str, ShardResult],
    folders: Folders,
    output: Path,
) -> MergedModel:
    """Write the files beside the weights.

    Args:
        step: what is merged.
        planned: what was made.
        found: of its shards and their index.
        folders: of all sources; of these only small files are read.
        output: the model's folder.
    """
    recipe, examined = step.recipe, step.examined
    donor = step.inputs.donor
    dtype = recipe.output_dtype or new_dtype(step.examined.checkpoints[donor.pinned])
    sidecars = write_sidecars(
        folders[donor.pinned],
        output,
        dtype,
        code=donor.name in recipe.allow_code,
        tokenizer=_tokenizer_files(examined.tokens.carried, folders),
        config=_stacked_config(step, folders) if recipe.slices else None,
    )
    return MergedModel(planned.digest, output, found, sidecars, _output_sizes(planned))


def _stacked_config(step: Step, folders: Folders) -> dict[str, Any]:
    inputs = step.inputs
    configs = {}
    for source in inputs.models:
        owner = inputs.donor if source.is_adapter else source
        text = (folders[owner.pinned] / "config.json").read_text(encoding="utf-8")
        configs[source.pinned] = json.loads(text)
    return configuration(step.recipe, inputs, step.examined.checkpoints, configs)


def new_dtype(checkpoint: Checkpoint) -> str | None:
    """What a configuration has to say of a model that keeps its dtypes; None: what it said."""
    holds_eight_bit = any(
        (tensor.adapted.base if tensor.adapted else tensor).scaled
        for tensor in checkpoint.tensors.values()
    )
    return "bfloat16" if holds_eight_bit else None


def write_weights(
    step: Step, planned: MergePlan, folders: Folders, output: Path, title: str, means: Means
) -> dict[str, ShardResult]:
    """Make the shards of a plan, as a stage of the run; `output` is made if it is not there."""
    output.mkdir(parents=True, exist_ok=True)
    planned = _as_made(step, planned)
    with step.progress.stage(title, planned.n_bytes, "bytes") as advance:
        found = run(planned, folders, output, means, advance)
    say_mended(step, (result.mended for result in found.values()))
    return found


def _as_made(step: Step, planned: MergePlan) -> MergePlan:
    return planned.allowing_nan if step.execution.allow_nan else planned


def say_mended(step: Step, found: Iterable[Mapping[str, int]]) -> None:
    """Tell which sources hold NaN or infinity, where that is allowed; `found` in how many tensors.

    Of tensors that an earlier run made nothing is told.
    """
    mended = Counter[str]()
    for one in found:
        mended.update(one)
    for label, n_tensors in mended.items():
        step.progress.say(
            f"{n_tensors} tensors of {label} hold NaN or infinity, which counts as the base's."
        )


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
    if step.recipe.slices:
        return _output_sizes(plan_of(step, None))
    tensors = step.examined.checkpoints[step.inputs.donor.pinned].tensors
    alignment = step.examined.tokens.alignment
    return {name: prod(shape(alignment, tensor)) for name, tensor in tensors.items()}


def uniform_twin(step: Step, schedule: DensitySchedule) -> DensitySchedule:
    """The same schedule with every density replaced by its mean: what guidance must beat."""
    return schedule.uniform_twin(sizes(step))


def _output_sizes(planned: MergePlan) -> dict[str, int]:
    outputs = [tensor.output for shard in planned.shards for tensor in shard.tensors]
    return {output.name: output.n_elements for output in outputs}


def _densities(
    schedule: DensitySchedule | None, names: Callable[[str], Iterable[str]]
) -> Schedule | None:
    """Every tensor's density, those that the guide leaves alone included; none of weights alone."""
    if schedule is None:
        return None
    return {
        expert.source: {name: expert.density(name) for name in names(expert.source)}
        for expert in schedule.experts
        if expert.tensors
    }


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
