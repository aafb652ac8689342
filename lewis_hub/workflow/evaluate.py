"""Evaluate: every model of a merge on the same items; what is scored once is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lewis_hub.evaluate.benchmarks import LoadedTasks, with_prompts
from lewis_hub.evaluate.gate import Demand, GateVerdict
from lewis_hub.evaluate.harness import EvaluationSettings, evaluate_model
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.plan import MergePlan
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Benchmark
from lewis_hub.workflow.calibrate import Guidance, Sets
from lewis_hub.workflow.contamination import ScoredTasks
from lewis_hub.workflow.load import ModelLoader
from lewis_hub.workflow.merge import (
    MergedModel,
    PlanSettings,
    SidecarSettings,
    finish_model,
    write_weights,
)
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.statistics import Gathered, StatisticsSettings, gather


@dataclass(frozen=True)
class Candidate:
    """A model to be scored: `identity` names its content, `label` its part in the merge."""

    label: str
    identity: str
    folder: Path


@dataclass(frozen=True)
class Run:
    """One evaluation of several models.

    Attributes:
        limit: only so many first items of each task.
        kept: folder with the results of models that were scored before.
    """

    loaded: LoadedTasks
    limit: int | None
    settings: EvaluationSettings
    kept: Path


@dataclass(frozen=True)
class Scored:
    """A merge beside its rivals, what all did item by item, and what the gate says of that."""

    scores: Scores
    results: Mapping[str, ModelResult]  # by label
    gate: GateVerdict | None = None

    @property
    def items(self) -> ModelResult:
        """What the merge itself did."""
        return self.results["merged"]


@dataclass(frozen=True)
class PlainTwin:
    """The same merge without statistics, to be scored beside it.

    Attributes:
        label: of its scores.
        plan: of its weights.
        takes_schedule: whether a guide's densities are its own too.
    """

    label: str
    plan: PlanSettings
    takes_schedule: bool


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored.

    Attributes:
        limit: only so many first items of each task.
        settings: how models are run.
        rivals: label -> source that is scored beside the merge.
        uniform_twin: whether the merge is made again, with uniform densities.
        plain_twin: None: there is none.
        demands: of the quality gate.
        benchmarks: task -> the Hub's benchmark on whose leaderboard the score appears.
    """

    limit: int | None
    settings: EvaluationSettings
    rivals: Mapping[str, OpenedSource]
    uniform_twin: bool
    plain_twin: PlainTwin | None
    demands: tuple[Demand, ...]
    benchmarks: Mapping[str, Benchmark]


@dataclass(frozen=True)
class TwinMaker:
    """Makes merges to be scored beside the merge itself; they stay in the scratch folder.

    Attributes:
        plan: of the merge.
        sidecars: of the merge.
        loader: of the sources.
        statistics: how second moments are gathered; None: the method needs none.
        sets: calibration texts, one an expert.
    """

    plan: PlanSettings
    sidecars: SidecarSettings
    loader: ModelLoader
    statistics: StatisticsSettings | None
    sets: Sets

    def uniform(self, schedule: DensitySchedule) -> Candidate:
        """Make the merge with every density replaced by the mean: what guidance must beat."""
        uniform = schedule.uniform_twin(self.plan.sizes())
        known, scratch = Gathered(), self.loader.scratch
        if self.statistics:
            known = gather(self.statistics, self.sets, self.loader, uniform, scratch)
        planned = self.plan.plan(uniform, known.statistics)
        return self._make("uniform", planned, "Merging the uniform twin", known)

    def plain(self, twin: PlainTwin, schedule: DensitySchedule | None) -> Candidate:
        """Make the merge without statistics."""
        planned = twin.plan.plan(schedule if twin.takes_schedule else None)
        title = f"Merging its twin {twin.label.replace('_', ' ')}"
        return self._make(twin.label, planned, title, Gathered())

    def _make(self, label: str, planned: MergePlan, title: str, known: Gathered) -> Candidate:
        loader, output = self.loader, self.loader.scratch / label
        places = {**loader.places, **known.folders}
        shards = write_weights(planned, places, output, loader.means, loader.progress, title)
        made = finish_model(planned, shards, self.sidecars, loader.files.folders, output)
        return Candidate(label, made.identity, made.folder)


def score_merge(
    evaluation: EvaluationPlan,
    tasks: ScoredTasks,
    merged: MergedModel,
    guidance: Guidance | None,
    maker: TwinMaker,
) -> Scored:
    """Score the merge beside its rivals; its twins are made for this.

    Raises:
        EvaluationError: a task or a model cannot be used.
    """
    loader, twins = maker.loader, [Candidate("merged", merged.identity, merged.folder)]
    schedule = guidance.schedule if guidance else None
    if evaluation.plain_twin:
        twins.insert(0, maker.plain(evaluation.plain_twin, schedule))
    if evaluation.uniform_twin and schedule:
        twins.insert(0, maker.uniform(schedule))
    rivals = [
        Candidate(label, source.digest, loader.materialize_checkpoint(source))
        for label, source in evaluation.rivals.items()
    ]
    kept = loader.scratch / "scored"
    run = Run(tasks.loaded, evaluation.limit, evaluation.settings, kept)
    results = score([*rivals, *twins], run, loader.progress)
    return Scored(compare(results), results)


def score(
    candidates: Sequence[Candidate], run: Run, progress: Progress
) -> Mapping[str, ModelResult]:
    """Score the candidates on the same items; label -> what it did.

    Raises:
        EvaluationError: a task or a model cannot be used.
    """
    run.kept.mkdir(parents=True, exist_ok=True)
    progress.say("Preparing the benchmarks")
    benchmarks = with_prompts(run.loaded, run.limit)
    files = {candidate.label: run.kept / _file_name(candidate, run) for candidate in candidates}
    results: dict[str, ModelResult] = {}
    n_new = sum(not file.exists() for file in files.values())
    with progress.stage("Evaluating", n_new * benchmarks.n_requests, "items") as advance:
        for candidate in candidates:
            file = files[candidate.label]
            if not file.exists():
                result = evaluate_model(candidate.folder, benchmarks, run.settings, advance)
                write_whole(file, result.to_json())
            results[candidate.label] = ModelResult.from_json(file.read_text(encoding="utf-8"))
    return results


def _file_name(candidate: Candidate, run: Run) -> str:
    """Changes with the model, the tasks, their own files and data, the settings and lm-eval."""
    selected, commits = run.loaded.selection, run.loaded.commits
    own = selected.include
    texts = {str(file.relative_to(own)): sha256_of(file) for file in _files(own)} if own else {}
    asked = [candidate.identity, selected.names, texts, run.limit, vars(run.settings)]
    told = json.dumps([*asked, sorted(commits.values()), version("lm_eval")])
    digest = hashlib.sha256(told.encode()).hexdigest()
    return f"{digest[:32]}.json"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
