"""Compile a recipe into a job: `prepare` computes all values that the steps of a merge need.

    recipe + execution - resolve - open - check - MergeJob

The steps below take no recipe, only the values of the job that they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.display import Progress
from lewis_hub.errors import PublishError
from lewis_hub.evaluate.gate import Demand
from lewis_hub.evaluate.harness import EvaluationSettings
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.guides import registry as guides
from lewis_hub.guides.schedule import Bounds, Use
from lewis_hub.hub.facts import Licence, ModelFacts, combined_licence
from lewis_hub.hub.source import Source
from lewis_hub.merge.runners import Backend
from lewis_hub.methods import registry
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.recipe.schema import Evaluation, Recipe
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.lock import Lock
from lewis_hub.report.mergekit import METHODS, MergekitMerge
from lewis_hub.workflow.calibrate import GuideSettings
from lewis_hub.workflow.check import CheckReport
from lewis_hub.workflow.evaluate import EvaluationPlan, PlainTwin
from lewis_hub.workflow.examine import (
    Examined,
    examine_sources,
    has_uniform_twin,
    measurement_of,
    plain_twin,
    plan_settings,
    rivals_of,
    task_selection,
    workload_of,
)
from lewis_hub.workflow.fetch import FetchedSources, ModelLoader
from lewis_hub.workflow.merge import (
    PlanSettings,
    SidecarSettings,
    name_by_pin,
    new_dtype,
    stack_config,
    stacked_blocks,
)
from lewis_hub.workflow.open import MergeSources
from lewis_hub.workflow.report import ReportSettings, locked_data, locked_input
from lewis_hub.workflow.resolve import (
    Inputs,
    RecipeSnapshot,
    calibrations_of,
    merged_entries,
    needs_moments,
    snapshot,
    sources_by_reference,
)
from lewis_hub.workflow.resources import (
    DiskNeeds,
    Execution,
    Loading,
    Measurement,
    Workload,
    software,
)
from lewis_hub.workflow.statistics import StatisticsSettings
from lewis_hub.workflow.texts import ScoredTasks, Sets, TextSettings

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class MergeJob:
    """A compiled recipe: all values that a merge needs.

    Attributes:
        report: the result of the check; it has no problems.
        code: sources whose Python files are copied.
        guide: None: densities come from the recipe's settings.
        statistics: None: the method needs no second moments.
        sidecars: the files beside the weights.
        evaluation: None: nothing is scored.
        held_out: tasks whose items no calibration text may hold, scored now or later.
        reporting: the values of the report that are known before the merge.
        repo: target repo; None: the merge stays on disk.
        means: runner and device that make the weights.
        replaces: whether an existing output folder may be replaced.
    """

    report: CheckReport
    sources: MergeSources
    code: tuple[Source, ...]
    measurement: Measurement
    texts: TextSettings
    guide: GuideSettings | None
    statistics: StatisticsSettings | None
    plan: PlanSettings
    sidecars: SidecarSettings
    evaluation: EvaluationPlan | None
    held_out: TaskSelection | None
    reporting: ReportSettings
    repo: str | None
    workload: Workload
    means: Backend
    replaces: bool

    @property
    def planned(self) -> Lock:
        """The lock of the merge, without its outputs."""
        return self.reporting.planned

    def disk_needs(self, sets: Sets = (), *, keeps_models: bool = True) -> DiskNeeds:
        """Return the bytes that the merge takes on the disk.

        Args:
            sets: calibration texts, one set per expert; empty: they are not drawn yet.
            keeps_models: whether whole models may be on this disk.
        """
        report, calibrations = self.report, self.measurement.calibrations if sets else ()
        n_tokens = {c: own.tokens.n_tokens for c, own in zip(calibrations, sets, strict=True)}
        loading = self.workload.loading if keeps_models else Loading(max_memory_bytes=0)
        checkpoints = self.sources.checkpoints.values()
        return DiskNeeds(
            report.download_bytes,
            report.output_bytes,
            report.disk_bytes - report.states_bytes,
            self.workload.statistics_bytes(),
            self.measurement.waiting_bytes(n_tokens, checkpoints, loading),
            self.plan.max_shard_bytes,
        )

    def scored_tasks(self, api: HfApi, progress: Progress) -> ScoredTasks | None:
        """Return the tasks that are scored now or later; they are loaded on first use."""
        if self.held_out is None:
            return None
        return ScoredTasks(self.held_out, self.evaluation is not None, api, progress)

    def loader(self, files: FetchedSources, scratch: Path, progress: Progress) -> ModelLoader:
        """Return the loader of the sources; its temporary files go to `scratch`."""
        loading = self.workload.loading
        if not files.keeps_models:
            loading = replace(loading, max_memory_bytes=0)
        size = self.plan.max_shard_bytes
        return ModelLoader(files, scratch, loading, self.means, size, progress)


def prepare(recipe: Recipe, execution: Execution, api: HfApi, progress: Progress) -> MergeJob:
    """Pin, open and check the sources of a recipe, and compile it.

    Raises:
        CheckFailedError: the sources do not fit together or do not fit the recipe.
        LewisHubError: a source cannot be found or read; this machine lacks a device or runner.
    """
    return compile_job(recipe, execution, examine_sources(recipe, execution, api, progress), api)


def planned_lock(
    recipe: Recipe, inputs: Inputs, max_shard_bytes: int, taken: RecipeSnapshot
) -> Lock:
    """Return the lock of a planned merge, without outputs and calibration rows."""
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    return Lock(
        inputs=tuple(locked_input(one, is_base=one is inputs.base) for one in inputs.models),
        calibration=tuple(locked_data(inputs.data[one], one) for one in calibrations_of(recipe)),
        recipe=taken.document,
        method=recipe.merge_method,
        method_version=registry.find(recipe.merge_method).version,
        guide=guide.name if guide else None,
        guide_version=guide.version if guide else None,
        seed=recipe.seed,
        max_shard_bytes=max_shard_bytes,
        outputs={},
        software=software(),
    )


def take_snapshot(recipe: Recipe, inputs: Inputs) -> RecipeSnapshot:
    """Return the recipe as it is run, with every revision pinned."""
    return snapshot(recipe, sources_by_reference(recipe, inputs), inputs.data)


def compile_job(recipe: Recipe, execution: Execution, examined: Examined, api: HfApi) -> MergeJob:
    """Compile a recipe whose sources were examined; nothing is read.

    It may be another recipe of the same sources.

    Raises:
        MergeError: the settings do not fit the method or the sources.
    """
    inputs, sources, tokens = examined.inputs, examined.sources, examined.tokens
    measurement, slices = measurement_of(recipe), examined.slices
    plan = plan_settings(recipe, execution, sources, tokens, slices)
    sidecars = SidecarSettings(
        donor=sources.donor.pinned,
        dtype=recipe.output_dtype or new_dtype(sources.donor.checkpoint),
        code=inputs.donor.name in recipe.allow_code,
        tokenizer=tokens.carried,
        config=stack_config(slices, sources) if slices else None,
    )
    reporting = _report_settings(recipe, execution, examined, api)
    guide = _guide_settings(recipe, sources, measurement, plan)
    output = examined.workload.output
    evaluation, allow_code = recipe.evaluate, execution.allow_code
    held_out = evaluation or execution.held_out
    return MergeJob(
        report=examined.report,
        sources=sources,
        code=(inputs.donor,) if sidecars.code else (),
        measurement=measurement,
        texts=TextSettings(
            inputs.donor, recipe.seed, allow_code, inputs.data, measurement.calibrations
        ),
        guide=guide,
        statistics=_statistics_settings(
            recipe, examined, measurement, plan, sidecars, reporting.planned.digest
        ),
        plan=plan,
        sidecars=sidecars,
        evaluation=_evaluation(recipe, evaluation, execution, examined) if evaluation else None,
        held_out=task_selection(held_out, recipe.locate, allow_code=allow_code)
        if held_out
        else None,
        reporting=reporting,
        repo=recipe.publish.repo if recipe.publish else None,
        workload=workload_of(recipe, execution, sources, measurement, output),
        means=execution.means(is_read_next=recipe.evaluate is not None),
        replaces=execution.replace,
    )


def _guide_settings(
    recipe: Recipe, sources: MergeSources, measurement: Measurement, plan: PlanSettings
) -> GuideSettings | None:
    entry, guide = recipe.guide, measurement.guide
    if entry is None or guide is None or sources.base is None:
        return None
    texts = entry.calibration
    return GuideSettings(
        guide=guide,
        base=sources.base,
        experts=sources.experts,
        tokenizer=sources.donor.name,
        bounds=Bounds(entry.gamma, entry.epsilon, entry.default_density, entry.mean_density),
        use=Use(entry.apply_to, recipe.seed),
        calibration=texts.model_dump(mode="json", exclude_none=True) if texts else {},
        beside=Path(recipe.locate("importance")),
        plan=plan,
    )


def _statistics_settings(
    recipe: Recipe,
    examined: Examined,
    measurement: Measurement,
    plan: PlanSettings,
    sidecars: SidecarSettings,
    digest: str,
) -> StatisticsSettings | None:
    if measurement.moments is None:
        return None
    sources, carried = examined.sources, examined.tokens.carried
    reader = carried.donor if carried else sources.donor.pinned
    return StatisticsSettings(
        method=recipe.merge_method,
        moments=measurement.moments,
        sources=sources,
        tokenizer=sources.donor.name,
        reader=next(one for one in sources.models if one.pinned == reader),
        plan=plan,
        sidecars=sidecars,
        digest=digest,
    )


def _evaluation(
    recipe: Recipe, evaluation: Evaluation, execution: Execution, examined: Examined
) -> EvaluationPlan:
    twin = None
    if plain := plain_twin(recipe):
        label, other = plain
        sources, tokens, slices = examined.sources, examined.tokens, examined.slices
        plan = plan_settings(other, execution, sources, tokens, slices)
        twin = PlainTwin(label, plan, takes_schedule=label == "by_magnitude")
    return EvaluationPlan(
        limit=evaluation.limit,
        settings=EvaluationSettings(
            device=execution.device, chat_template=evaluation.chat_template
        ),
        rivals=rivals_of(evaluation, examined.sources),
        uniform_twin=has_uniform_twin(recipe),
        plain_twin=twin,
        demands=tuple(
            Demand(gate.task, gate.metric, gate.not_worse_than, gate.tolerance, gate.on_refusal)
            for gate in evaluation.gate or ()
        ),
        benchmarks=evaluation.benchmarks or {},
    )


def _report_settings(
    recipe: Recipe, execution: Execution, examined: Examined, api: HfApi
) -> ReportSettings:
    inputs = examined.inputs
    taken = take_snapshot(recipe, inputs)
    planned = planned_lock(recipe, inputs, execution.max_shard_bytes, taken)
    mergekit = _mergekit(recipe, examined, taken)
    repo = recipe.publish.repo if recipe.publish else None
    chosen = recipe.publish.license if recipe.publish else None
    facts = {one.pinned: one.facts for one in examined.sources.models}
    card = CardFacts(
        title=repo.partition("/")[2] if repo else "Merged model",
        repo=repo,
        endpoint=api.endpoint,
        base=inputs.base,
        experts=inputs.experts,
        models=facts,
        datasets=inputs.datasets,
        parameters={},
        dtype=recipe.output_dtype,
        method=registry.find(recipe.merge_method),
        guided=None,
        scores=None,
        costs=(),
        recipe=taken.to_yaml(),
        licence=_licence([facts[one.pinned] for one in inputs.models], chosen),
        licence_chosen=chosen is not None,
        config={},
        chat=False,
        custom_code=inputs.donor.name in recipe.allow_code,
        mergekit=mergekit is not None,
        digest=planned.digest,
        software=planned.software,
        stack=stacked_blocks(examined.slices),
        in_sequence=fits_in_sequence(recipe),
        scored_in_chat=recipe.evaluate is not None and recipe.evaluate.chat_template,
    )
    benchmarks = (recipe.evaluate.benchmarks or {}) if recipe.evaluate else {}
    return ReportSettings(card, planned, taken, mergekit, benchmarks, execution.device)


def _licence(facts: Sequence[ModelFacts], chosen: str | None) -> Licence | None:
    """Return the licence of the merge; None if the parents differ and none was chosen."""
    try:
        return combined_licence(facts, chosen)
    except PublishError:
        return None


def _mergekit(recipe: Recipe, examined: Examined, taken: RecipeSnapshot) -> MergekitMerge | None:
    inputs = examined.inputs
    if recipe.merge_method not in METHODS or needs_moments(recipe):
        return None
    entries = zip(merged_entries(recipe), inputs.experts, strict=True)
    document = taken.document
    return MergekitMerge(
        method=recipe.merge_method,
        base=inputs.base.pinned if inputs.base else None,
        models={expert.pinned: entry.parameters for entry, expert in entries},
        slices=name_by_pin(recipe.slices, sources_by_reference(recipe, inputs)),
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        schedule=None,
        tensors=tuple(examined.sources.donor.checkpoint.tensors),
        adapters=tuple(one.pinned for one in inputs.experts if one.is_adapter),
        tokenizer={k: document[k] for k in ("tokenizer_source", "tokenizer") if k in document},
    )
