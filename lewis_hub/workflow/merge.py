"""Plan a merge, and write its shards and the files beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.ranges import Locations
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.engine import ShardResult, run
from lewis_hub.merge.in_memory import tensors_in_memory
from lewis_hub.merge.plan import Known, MergePlan, informed
from lewis_hub.merge.planning import MergeSettings, Schedule, make_plan
from lewis_hub.merge.runners import Backend, Ray, threads
from lewis_hub.merge.sidecars import TokenizerFiles, write_sidecars
from lewis_hub.merge.slices import StackSettings, make_stacked_plan
from lewis_hub.progress import Progress
from lewis_hub.workflow.fetch import Folders
from lewis_hub.workflow.slices import restacked
from lewis_hub.workflow.tokenizers import Carried

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergedModel:
    """A merged model.

    Attributes:
        identity: digest of its plan; models with the same digest have the same weights.
        shards: by file name, including the index. The shards of a stream are only on the Hub.
        sidecars: paths of the files beside the weights, relative to `folder`.
        parameters: tensor -> number of parameters.
    """

    identity: str
    folder: Path
    shards: Mapping[str, ShardResult]
    sidecars: tuple[str, ...]
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a plan, without densities and second moments.

    Attributes:
        settings: of whole models, or of a stack of their blocks.
        max_shard_bytes: limit for a file.
        allow_nan: whether NaN and infinity in sources are replaced by the base's values.
    """

    settings: MergeSettings | StackSettings
    max_shard_bytes: int
    allow_nan: bool

    def plan(self, schedule: DensitySchedule | None, statistics: Known = ()) -> MergePlan:
        """Return the plan: sources and settings of each output tensor.

        Args:
            schedule: of a guide, for a stack by the names of the output; None: no guide.
            statistics: second moments or fitted matrices, if the method needs them.

        Raises:
            MergeError: the settings do not fit the method or the sources.
        """
        planned = informed(self._plan(schedule), statistics)
        return planned.allowing_nan if self.allow_nan else planned

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each tensor of the merge."""
        return output_sizes(self._plan(None))

    def restack(self, schedule: DensitySchedule) -> DensitySchedule:
        """Return the schedule by the tensors of the stack; unchanged for whole models."""
        if isinstance(self.settings, MergeSettings):
            return schedule
        return restacked(schedule, self._plan(None))

    def _plan(self, schedule: DensitySchedule | None) -> MergePlan:
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


def _densities(schedule: DensitySchedule, names: Callable[[str], Iterable[str]]) -> Schedule:
    """Return the density of every tensor, with the default for tensors outside of the guide."""
    return {
        expert.source: {name: expert.density(name) for name in names(expert.source)}
        for expert in schedule.experts
        if expert.tensors
    }


@dataclass(frozen=True)
class SidecarSettings:
    """The settings of the files beside the weights.

    Attributes:
        donor: pinned source whose configuration is copied.
        dtype: the dtype in `config.json`; None: the donor's.
        code: whether the donor's Python files are copied.
        tokenizer: None: the donor's, unchanged.
        config: `config.json` of a stack; None: the donor's.
    """

    donor: str
    dtype: str | None
    code: bool
    tokenizer: Carried | None
    config: Mapping[str, Any] | None

    def write(self, folders: Folders, output: Path) -> tuple[str, ...]:
        """Write the files; return their paths, relative to `output`."""
        tokenizer = None
        if carried := self.tokenizer:
            tokenizer = TokenizerFiles(
                folders[carried.donor],
                carried.written,
                carried.dropped,
                carried.config,
                carried.generation,
            )
        return write_sidecars(
            folders[self.donor],
            output,
            self.dtype,
            code=self.code,
            tokenizer=tokenizer,
            config=self.config,
        )


def write_weights(
    planned: MergePlan,
    locations: Locations,
    output: Path,
    means: Backend,
    progress: Progress,
    title: str = "Merging",
) -> dict[str, ShardResult]:
    """Write the shards of a plan into a folder; finished shards of an earlier run are kept.

    `title` names the stage that shows progress.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room.
    """
    output.mkdir(parents=True, exist_ok=True)
    with progress.stage(title, planned.n_bytes, "bytes") as advance:
        found = run(planned, locations, output, means, advance)
    report_nan((result.mended for result in found.values()), progress)
    return found


def finish_model(
    planned: MergePlan,
    shards: Mapping[str, ShardResult],
    sidecars: SidecarSettings,
    folders: Folders,
    output: Path,
) -> MergedModel:
    """Write the files beside the shards that were made."""
    written = sidecars.write(folders, output)
    return MergedModel(planned.digest, output, shards, written, output_sizes(planned))


def merge_in_memory(
    planned: MergePlan, locations: Locations, scratch: Path, means: Backend
) -> dict[str, Tensor]:
    """Make the tensors of a plan in memory; a Ray cluster is replaced by threads.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
    """
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
