"""Plan a merge, and write its shards and the files beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import Locations
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.display import Progress
from lewis_hub.errors import MergeError
from lewis_hub.files import sha256_of
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.hub.source import Source
from lewis_hub.merge import plan as plans
from lewis_hub.merge import slices as stacks
from lewis_hub.merge.engine import NOTE, ShardResult, run, tensors_in_memory
from lewis_hub.merge.mixture import MixtureSettings, make_mixture_plan
from lewis_hub.merge.plan import MergePlan, MergeSettings, MergeSource, Statistics, make_plan
from lewis_hub.merge.runners import Backend, Ray, threads
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.merge.slices import Blocks, MergeSlice, StackSettings, make_stacked_plan
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import Slice, SliceSource
from lewis_hub.workflow.open import MergeSources, OpenedSource

if TYPE_CHECKING:
    from torch import Tensor


Folders = Mapping[str, Path]  # pinned source -> a folder with at least its small files


@dataclass(frozen=True)
class MergedModel:
    """A merged model."""

    identity: str  # digest of its plan and of the files beside the weights
    folder: Path
    # by file name, including the index. The shards of a stream are only on the Hub.
    shards: Mapping[str, ShardResult]
    sidecars: tuple[str, ...]  # paths of the files beside the weights, relative to `folder`
    parameters: Mapping[str, int]  # tensor -> number of parameters


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a plan, without densities and second moments."""

    settings: MergeSettings | StackSettings | MixtureSettings  # of whole models, blocks or MLPs
    max_shard_bytes: int  # limit for a file
    allow_nan: bool  # whether NaN and infinity in experts are replaced by the base's values

    def plan(
        self, schedule: DensitySchedule | None, statistics: Sequence[Statistics] | plans.Fitted = ()
    ) -> MergePlan:
        """Return the plan: sources and settings of each output tensor.

        Args:
            schedule: of a guide, for a stack by the names of the output; None: no guide.
            statistics: second moments or fitted matrices, if the method needs them.
        """
        planned = plans.with_statistics(self._plan(schedule), statistics)
        return planned.allowing_nan if self.allow_nan else planned

    def reading(self, sources: Iterable[OpenedSource]) -> PlanSettings:
        """Return the settings of the same merge of whole models, with these headers of theirs."""
        if not isinstance(self.settings, MergeSettings):
            return self
        known = {one.pinned: one for one in sources}
        experts = tuple(
            replace(one, checkpoint=known[one.label].checkpoint, digest=known[one.label].digest)
            for one in self.settings.experts
        )
        return replace(self, settings=replace(self.settings, experts=experts))

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each tensor of the merge."""
        return output_sizes(self._plan(None))

    def restack(self, schedule: DensitySchedule) -> DensitySchedule:
        """Return the schedule by the tensors of the stack; unchanged for whole models."""
        if not isinstance(self.settings, StackSettings):
            return schedule
        found: dict[str, dict[str, float]] = {one.source: {} for one in schedule.experts}
        given = {one.source: one.tensors for one in schedule.experts}
        for shard in self._plan(None).shards:
            for tensor in shard.tensors:
                for header, i in zip(tensor.inputs, tensor.sources, strict=True):
                    source = shard.labels[i]
                    if header.name in given.get(source, {}):
                        found[source][tensor.output.name] = given[source][header.name]
        experts = (replace(one, tensors=found[one.source]) for one in schedule.experts)
        return DensitySchedule(tuple(experts))

    def _plan(self, schedule: DensitySchedule | None) -> MergePlan:
        if isinstance(self.settings, MixtureSettings):
            return make_mixture_plan(self.settings, self.max_shard_bytes)
        if isinstance(self.settings, StackSettings):
            plain = make_stacked_plan(self.settings, self.max_shard_bytes)
            if schedule is None:
                return plain
            names = output_sizes(plain)
            scheduled = _densities(schedule, lambda _: names)
            return make_stacked_plan(self.settings, self.max_shard_bytes, scheduled)
        if schedule is None:
            return make_plan(self.settings, self.max_shard_bytes)
        weights = {expert.source: expert.weights for expert in schedule.experts}
        experts = tuple(
            replace(expert, weights=weights.get(expert.label, {}))
            for expert in self.settings.experts
        )
        tensors = {expert.label: expert.checkpoint.tensors for expert in experts}
        scheduled = _densities(schedule, lambda label: tensors[label])
        return make_plan(replace(self.settings, experts=experts), self.max_shard_bytes, scheduled)


def output_sizes(planned: MergePlan) -> dict[str, int]:
    """Return the number of elements of each tensor that a plan makes."""
    outputs = [tensor.output for shard in planned.shards for tensor in shard.tensors]
    return {output.name: output.n_elements for output in outputs}


def _densities(schedule: DensitySchedule, names: Callable[[str], Iterable[str]]) -> plans.Schedule:
    """Return the density of every tensor, with the default for tensors outside of the guide."""
    return {
        expert.source: {name: expert.density(name) for name in names(expert.source)}
        for expert in schedule.experts
        if expert.tensors
    }


def write_weights(
    planned: MergePlan,
    locations: Locations,
    output: Path,
    means: Backend,
    progress: Progress,
    title: str = "Merging",
) -> dict[str, ShardResult]:
    """Write the shards of a plan into a folder; finished shards of an earlier run are kept.

    All other files in it are deleted, but for hidden ones: those of an earlier run with other
    settings would be read as parts of this model.
    """
    output.mkdir(parents=True, exist_ok=True)
    keep = {name for one in planned.layouts for name in (one.name, one.name + NOTE)}
    for path in output.iterdir():
        if path.name not in keep and not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with progress.stage(title, planned.n_bytes, "bytes") as advance:
        found = run(planned, locations, output, means, advance)
    report_nan((result.replaced_nan for result in found.values()), progress)
    return found


def finish_model(
    planned: MergePlan,
    shards: Mapping[str, ShardResult],
    sidecars: SidecarSettings,
    sources: Mapping[str, Source],
    output: Path,
) -> MergedModel:
    """Write the files beside the shards that were made.

    Raises:
        SourceError: a source changed since it was pinned.
    """
    for source in sources.values():
        require_unchanged(source)
    written = sidecars.write(sources, output)
    facts = [planned.digest, {path: sha256_of(output / path) for path in written}]
    identity = "sha256:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return MergedModel(identity, output, shards, written, output_sizes(planned))


def merge_in_memory(
    planned: MergePlan, locations: Locations, scratch: Path, means: Backend
) -> dict[str, Tensor]:
    """Make the tensors of a plan in memory; a Ray cluster is replaced by threads."""
    if isinstance(means.runner, Ray):
        means = replace(means, runner=threads())
    return tensors_in_memory(planned, locations, scratch, means)


def report_nan(found: Iterable[Mapping[str, int]], progress: Progress) -> None:
    """Show which sources hold NaN or infinity, and in how many tensors made by this run."""
    total = Counter[str]()
    for counts in found:
        total.update(counts)
    for label, n_tensors in total.items():
        progress.say(
            f"{n_tensors} tensors of {label} hold NaN or infinity; the base's values replace them."
        )


def new_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the dtype for `config.json` if the model keeps its dtypes; None: unchanged."""
    holds_eight_bit = any(
        (tensor.adapted.base if tensor.adapted else tensor).scaled
        for tensor in checkpoint.tensors.values()
    )
    return "bfloat16" if holds_eight_bit else None


def merge_slices(
    slices: Sequence[Slice],
    base_model: ModelReference | None,
    sources: Mapping[ModelReference, OpenedSource],
    *,
    takes_base: bool,
) -> tuple[MergeSlice, ...]:
    """Return the slices with their sources; `base_model` is the base of a slice that names none."""

    def blocks(one: SliceSource) -> Blocks:
        source = sources[one.model]
        return Blocks(MergeSource(source.checkpoint, source.digest, one.parameters), one.blocks)

    found = []
    for index, one in enumerate(slices):
        base = (one.base_model or base_model) if takes_base else None
        bases = [blocks(source) for source in one.sources if source.model == base]
        if base and not bases:
            problem = f"the base `{base}` is not among the slice's sources"
            remedy = "Add it to `sources` with its `layer_range`."
            raise MergeError(f"slices[{index}]", problem, remedy)
        experts = tuple(blocks(source) for source in one.sources if source.model != base)
        found.append(MergeSlice(bases[0] if bases else None, experts, one.parameters))
    return tuple(found)


def stack_config(settings: StackSettings, sources: MergeSources) -> dict[str, Any]:
    """Return the stack's `config.json`."""
    models = {
        one.pinned: stacks.Model(one.pinned, one.config, stacks.count_blocks(one.checkpoint))
        for one in sources.distinct
    }
    firsts = [one.base or one.experts[0] for one in settings.slices]
    origins = [(models[first.source.label], block) for first in firsts for block in first.numbers]
    return stacks.stacked_config(models[sources.donor.pinned], origins)


def output_headers(planned: MergePlan) -> Checkpoint:
    """Return the headers of the model that a plan makes."""
    headers = [
        TensorHeader(tensor.name, tensor.dtype, tensor.shape, layout.name, 0, tensor.n_bytes)
        for layout in planned.layouts
        for tensor in layout.tensors
    ]
    return Checkpoint("the merge", {header.name: header for header in headers})
