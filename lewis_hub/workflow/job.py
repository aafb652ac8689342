"""Compile a recipe into a job: `prepare` computes all values that the steps of a merge need.

    recipe + execution - resolve - open - check - MergeJob

The steps below take no recipe, only the values of the job that they use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.display import Progress
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.guides import registry as guides
from lewis_hub.guides.schedule import ScheduleSettings
from lewis_hub.hub.fetch import read_small
from lewis_hub.merge.aligned import AlignedModel
from lewis_hub.merge.mixture import MixtureSettings
from lewis_hub.merge.runners import Backend
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.methods import registry
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.formats import ExportFormat
from lewis_hub.recipe.rules import fits_in_sequence, runs_expert_blocks, trims_by_activation
from lewis_hub.recipe.schema import Recipe, Slice
from lewis_hub.report.facts import CardFacts, StackedBlocks
from lewis_hub.report.lock import Lock
from lewis_hub.report.mergekit import METHODS, MergekitMerge
from lewis_hub.workflow import calibrate, examine, resolve, resources
from lewis_hub.workflow.align import AlignmentSettings, aligner, alignment_settings
from lewis_hub.workflow.check import CheckReport
from lewis_hub.workflow.evaluate import EvaluationPlan, PlainTwin, settings_of
from lewis_hub.workflow.examine import Examined, examine_sources
from lewis_hub.workflow.export import require_exportable
from lewis_hub.workflow.fetch import FetchedSources, ModelLoader
from lewis_hub.workflow.merge import PlanSettings, new_dtype
from lewis_hub.workflow.mixture import RouterSettings, mixture_facts, router_settings
from lewis_hub.workflow.open import MergeSources
from lewis_hub.workflow.report import ReportSettings, locked_data, locked_input
from lewis_hub.workflow.republish import UNNAMED, published_as
from lewis_hub.workflow.resources import DiskNeeds, Execution
from lewis_hub.workflow.size import in_size
from lewis_hub.workflow.snapshot import RecipeSnapshot, snapshot
from lewis_hub.workflow.statistics import StatisticsSettings
from lewis_hub.workflow.texts import ScoredTasks, Sets, TextSettings


@dataclass(frozen=True)
class MergeJob:
    """A compiled recipe: all values that a merge needs."""

    report: CheckReport
    sources: MergeSources
    texts: TextSettings
    guide: calibrate.GuideSettings | None  # None: densities come from the recipe's settings
    statistics: StatisticsSettings | None  # None: the method needs no second moments
    alignment: AlignmentSettings | None  # None: no model is permuted
    routers: RouterSettings | None  # None: it is no mixture of experts
    plan: PlanSettings
    sidecars: SidecarSettings
    exports: tuple[ExportFormat, ...]  # other formats that are written too
    evaluation: EvaluationPlan | None  # None: nothing is scored
    held_out: TaskSelection | None  # no calibration text may hold items of these tasks
    reporting: ReportSettings
    repo: str | None  # target repo; None: the merge stays on disk
    workload: resources.Workload
    means: Backend  # runner and device that make the weights
    replaces: bool  # whether an existing output folder may be replaced

    @property
    def planned(self) -> Lock:
        """The lock of the merge, without the outputs that it makes."""
        return self.reporting.planned

    @property
    def draws_by_own_tasks(self) -> bool:
        """Whether texts are drawn from own task files, or compared with the items of such."""
        calibrations = self.texts.calibrations
        are_compared = any(not one.allow_overlap for one in calibrations)
        held_out = self.held_out.include if self.held_out else None
        return any(one.include for one in calibrations) or bool(are_compared and held_out)

    def disk_needs(self, sets: Sets = (), *, keeps_models: bool = True) -> DiskNeeds:
        """Return the bytes that the merge takes on the disk, before or after texts are drawn."""
        report, calibrations = self.report, self.texts.calibrations if sets else ()
        n_tokens = {
            c: c.samples * c.max_tokens if c.is_written else own.tokens.n_tokens
            for c, own in zip(calibrations, sets, strict=True)
        }
        loading = self.workload.loading if keeps_models else resources.Loading(max_memory_bytes=0)
        checkpoints = self.sources.checkpoints
        return DiskNeeds(
            report.download_bytes,
            report.disk_bytes - report.states_bytes,
            self.workload.statistics_bytes(),
            self.workload.measurement.waiting_bytes(n_tokens, checkpoints, loading),
            min(self.plan.max_shard_bytes, report.output_bytes),
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

    def aligned(self, models: Sequence[AlignedModel]) -> MergeJob:
        """Return the same job; everything after the alignment reads the models as permuted."""
        if not models:
            return self
        permuted = aligner(models, self.sources.donor)
        sources, guide, statistics = self.sources.replaced(permuted), self.guide, self.statistics
        plan, evaluation = self.plan.reading(sources.models), self.evaluation
        if guide:
            guide = replace(guide, experts=sources.experts, plan=plan)
        if statistics:
            reader = permuted(statistics.reader)
            statistics = replace(statistics, sources=sources, reader=reader, plan=plan)
        if evaluation and evaluation.plain_twin:
            twin = evaluation.plain_twin
            twin = replace(twin, plan=twin.plan.reading(sources.models))
            evaluation = replace(evaluation, plain_twin=twin)
        return replace(
            self,
            sources=sources,
            guide=guide,
            statistics=statistics,
            plan=plan,
            evaluation=evaluation,
        )


def prepare(recipe: Recipe, execution: Execution, api: HfApi, progress: Progress) -> MergeJob:
    """Pin, open and check the sources of a recipe, and compile it.

    Raises:
        CheckFailedError: the sources do not fit together or do not fit the recipe.
        LewisHubError: a source cannot be found or read; this machine lacks a device or runner.
    """
    return compile_job(recipe, execution, examine_sources(recipe, execution, api, progress), api)


def planned_lock(
    recipe: Recipe, inputs: resolve.Inputs, max_shard_bytes: int, pinned: RecipeSnapshot
) -> Lock:
    """Return the lock of a planned merge, without calibration rows; its outputs are task files."""
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    return Lock(
        inputs=tuple(locked_input(one, is_base=one is inputs.base) for one in inputs.models),
        calibration=tuple(
            locked_data(inputs.data[one], one)
            for one in resolve.calibrations_of(recipe)
            if one in inputs.data
        ),
        recipe=pinned.document,
        method=recipe.merge_method,
        method_version=registry.find(recipe.merge_method).version,
        guide=guide.name if guide else None,
        guide_version=guide.version if guide else None,
        seed=recipe.seed,
        max_shard_bytes=max_shard_bytes,
        outputs=pinned.outputs,
        software=resources.software(),
    )


def compile_job(recipe: Recipe, execution: Execution, examined: Examined, api: HfApi) -> MergeJob:
    """Compile a recipe whose sources were examined, or another recipe of the same sources."""
    inputs, sources, tokens = examined.inputs, examined.sources, examined.tokens
    measurement, allow_code = examine.measurement_of(recipe), execution.allow_code
    plan = examine.plan_settings(recipe, execution, sources, tokens)
    sidecars = SidecarSettings(
        donor=sources.donor.pinned,
        dtype=recipe.output_dtype or new_dtype(sources.donor.checkpoint),
        code=inputs.donor.name in recipe.allow_code,
        tokenizer=tokens.carried,
        config=examine.model_config(recipe, plan, sources),
    )
    models = {one.pinned: one.source for one in sources.models}
    sidecars.require_readable(models, partial(read_small, api))
    if recipe.export and sources.are_read:
        require_exportable(plan, sidecars, sources, api)
    mixture = None
    if isinstance(plan.settings, MixtureSettings) and sources.are_read:
        mixture = plan.settings
    reporting = _report_settings(recipe, execution, examined)
    if mixture:
        mixed = mixture_facts(recipe, mixture, inputs)
        reporting = replace(reporting, facts=replace(reporting.facts, mixture=mixed))
    digest = reporting.planned.digest
    moments = measurement.moments
    evaluation, held_out = recipe.evaluate, recipe.evaluate or execution.held_out
    return MergeJob(
        report=examined.report,
        sources=sources,
        texts=TextSettings(
            *(inputs.donor, recipe.seed, allow_code, inputs.data, measurement.calibrations),
            beside=_beside(recipe, execution, "importance", "."),
        ),
        guide=_guide_settings(recipe, execution, sources, measurement, plan),
        statistics=_statistics(recipe, examined, moments, plan, sidecars, digest)
        if moments
        else None,
        alignment=alignment_settings(resolve.merged_entries(recipe), sources)
        if sources.are_read
        else None,
        routers=router_settings(recipe, mixture, sources) if mixture else None,
        plan=plan,
        sidecars=sidecars,
        exports=recipe.export or (),
        evaluation=_evaluation(recipe, evaluation, execution, examined) if evaluation else None,
        held_out=examine.task_selection(held_out, recipe.locate, allow_code=allow_code)
        if held_out
        else None,
        reporting=reporting,
        repo=recipe.publish.repo if recipe.publish else None,
        workload=examine.workload_of(recipe, execution, sources, measurement, examined.output),
        means=execution.means(is_read_next=evaluation is not None),
        replaces=execution.replace,
    )


def _beside(recipe: Recipe, execution: Execution, *names: str) -> tuple[Path, ...]:
    """Return folders beside the recipe, in which measurements of an earlier run may be."""
    return () if execution.measures_again else tuple(Path(recipe.locate(one)) for one in names)


def _statistics(
    recipe: Recipe,
    examined: Examined,
    moments: resources.MomentSettings,
    plan: PlanSettings,
    sidecars: SidecarSettings,
    digest: str,
) -> StatisticsSettings:
    """Return the settings of second moments; the texts are in tokens of the merge's tokenizer."""
    sources, carried = examined.sources, examined.tokens.carried
    reader = carried.source if carried else sources.donor.pinned
    return StatisticsSettings(
        method=recipe.merge_method,
        moments=moments,
        sources=in_size(resolve.merged_entries(recipe), sources),
        reader=next(one for one in sources.models if one.pinned == reader),
        plan=plan,
        sidecars=sidecars,
        digest=digest,
    )


def _guide_settings(
    recipe: Recipe,
    execution: Execution,
    sources: MergeSources,
    measurement: resources.Measurement,
    plan: PlanSettings,
) -> calibrate.GuideSettings | None:
    entry, guide = recipe.guide, measurement.guide
    if entry is None or guide is None or sources.base is None:
        return None
    texts = entry.calibration
    return calibrate.GuideSettings(
        guide=guide,
        base=sources.base,
        experts=sources.experts,
        schedule=ScheduleSettings(
            *(entry.gamma, entry.epsilon, entry.default_density, entry.mean_density),
            *(entry.apply_to, recipe.seed),
        ),
        calibration=texts.model_dump(mode="json", by_alias=True, exclude_none=True)
        if texts
        else {},
        beside=_beside(recipe, execution, "importance"),
        plan=plan,
    )


def _evaluation(
    recipe: Recipe, evaluation: Evaluation, execution: Execution, examined: Examined
) -> EvaluationPlan:
    twin = None
    if plain := examine.plain_twin(recipe):
        label, other = plain
        plan = examine.plan_settings(other, execution, examined.sources, examined.tokens)
        twin = PlainTwin(label, plan, takes_schedule=label == "by_magnitude")
    return EvaluationPlan(
        limit=evaluation.limit,
        settings=settings_of(evaluation, execution.device),
        rivals=examine.rivals_of(evaluation, examined.sources),
        uniform_twin=examine.has_uniform_twin(recipe),
        plain_twin=twin,
        gates=evaluation.gate or (),
        log_samples=evaluation.log_samples or "public",
    )


def _report_settings(recipe: Recipe, execution: Execution, examined: Examined) -> ReportSettings:
    inputs, facts, publish = examined.inputs, examined.facts, recipe.publish
    pinned = snapshot(recipe, inputs)
    planned = planned_lock(recipe, inputs, execution.max_shard_bytes, pinned)
    mergekit = _mergekit(recipe, examined, pinned.document)
    card = CardFacts(
        title=recipe.name or UNNAMED,
        repo=None,
        base=inputs.base,
        experts=inputs.experts,
        models=facts,
        datasets=inputs.datasets,
        dtype=recipe.output_dtype,
        method=registry.find(recipe.merge_method),
        recipe=pinned.to_yaml(),
        licence=None,
        licence_chosen=False,
        custom_code=inputs.donor.name in recipe.allow_code,
        mergekit=mergekit is not None,
        digest=planned.digest,
        software=planned.software,
        stack=_stacked_blocks(recipe, inputs),
        in_sequence=fits_in_sequence(recipe),
        in_expert_blocks=runs_expert_blocks(recipe),
        trims_by_activation=trims_by_activation(recipe),
        exports=recipe.export or (),
        scored_in_chat=recipe.evaluate is not None and recipe.evaluate.chat_template,
    )
    benchmarks = (recipe.evaluate.benchmarks or {}) if recipe.evaluate else {}
    card = published_as(card, publish)
    return ReportSettings(card, planned, pinned, mergekit, benchmarks, execution.device)


def _stacked_blocks(recipe: Recipe, inputs: resolve.Inputs) -> tuple[StackedBlocks, ...]:
    """Return the blocks of a stack and their sources, for the card."""
    sources, rows, first = resolve.by_reference(recipe, inputs.base, inputs.experts), [], 0
    takes_base = registry.find(recipe.merge_method).takes_base
    for one in recipe.slices:
        blocks = range(first, first + len(one.sources[0].blocks))
        base = (one.base_model or recipe.base_model) if takes_base else None
        made_from = tuple((sources[source.model], source.blocks) for source in one.sources)
        rows.append(StackedBlocks(blocks, made_from, sources[base] if base else None))
        first = blocks.stop
    return tuple(rows)


def _mergekit(
    recipe: Recipe, examined: Examined, document: Mapping[str, Any]
) -> MergekitMerge | None:
    """Return the merge for mergekit, if mergekit has its method; `document`: the pinned recipe."""
    inputs = examined.inputs
    is_own = recipe.merge_method not in METHODS or resolve.needs_moments(recipe)
    is_own = is_own or any(entry.align for entry in recipe.models)
    if is_own or recipe.mixed or recipe.made:
        return None
    entries = zip(resolve.merged_entries(recipe), inputs.experts, strict=True)
    return MergekitMerge(
        method=recipe.merge_method,
        base=inputs.base.pinned if inputs.base else None,
        models={expert.pinned: entry.parameters for entry, expert in entries},
        slices=tuple(Slice.model_validate(one) for one in document.get("slices", ())),
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        schedule=None,
        tensors=tuple(examined.sources.donor.checkpoint.tensors),
        adapters=tuple(one.pinned for one in inputs.experts if one.is_adapter),
        tokenizer={k: document[k] for k in ("tokenizer_source", "tokenizer") if k in document},
        arithmetic=recipe.arithmetic,
    )
