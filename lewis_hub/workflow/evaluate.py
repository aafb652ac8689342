"""Score the merge, its twins and its rivals on the same items; known scores are used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi

from lewis_hub.display import Advance, Progress
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings, require_installed
from lewis_hub.evaluate.benchmarks import (
    LoadedTasks,
    ScoredData,
    reading_only_named,
    with_prompts,
)
from lewis_hub.evaluate.embedding_tasks import n_documents
from lewis_hub.evaluate.embeddings import digest_of_items, evaluate_embedder
from lewis_hub.evaluate.gate import FILE, GateVerdict, Previous, judge
from lewis_hub.evaluate.harness import evaluate_model
from lewis_hub.evaluate.libraries import library_of, scoring_facts
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.samples import Samples
from lewis_hub.evaluate.scores import ModelResult, Scores
from lewis_hub.files import write_whole
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.publish import SIGNATURE
from lewis_hub.hub.target import read_target, read_text
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.recipe.evaluation import Evaluation, Gate
from lewis_hub.report import page
from lewis_hub.report.facts import Guided
from lewis_hub.report.findings import gate_section
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.merge import MergedModel, PlanSettings, finish_model, write_weights
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.samples import LogSamples, samples_of
from lewis_hub.workflow.statistics import Gathered, StatisticsSettings, gather
from lewis_hub.workflow.texts import ScoredTasks, Sets

CARD = "README.md"
ITEMS = "lewis/items.json"
SCORES = "lewis/scores.json"
KEPT = 3  # version of the results that a rerun uses again; 3: limits of answers are the tasks'


@dataclass(frozen=True)
class Candidate:
    """A model to score: `identity` is a digest of its content, `label` its role in the merge."""

    label: str
    identity: str
    folder: Path


@dataclass(frozen=True)
class Scored:
    """The scores of a merge and its rivals, their results by item, and the gate's verdict."""

    scores: Scores
    results: Mapping[str, ModelResult]  # by label
    gate: GateVerdict | None = None
    data: Mapping[str, ScoredData] = field(default_factory=dict)  # task -> its dataset
    samples: Samples = field(default_factory=Samples)

    @property
    def items(self) -> ModelResult:
        """The results of the merge, without the texts of its answers."""
        return self.results["merged"].without_answers


@dataclass(frozen=True)
class PlainTwin:
    """A twin of the merge without statistics, to be scored beside it."""

    label: str
    plan: PlanSettings
    takes_schedule: bool  # the guide's densities apply to it


@dataclass(frozen=True)
class EvaluationPlan:
    """The models to score, and how."""

    limit: int | None  # number of items of each task, from the first; None: all items
    settings: EvaluationSettings
    rivals: Mapping[str, OpenedSource]  # label -> source that is scored beside the merge
    uniform_twin: bool
    plain_twin: PlainTwin | None
    gates: tuple[Gate, ...]  # the conditions for publishing
    log_samples: LogSamples = "public"  # the tasks whose questions and answers are kept


def settings_of(asked: Evaluation, device: str) -> EvaluationSettings:
    """Return how models are run for an evaluation; a backend that is not installed is refused."""
    require_installed(asked.backend or "hf")
    return EvaluationSettings(
        device=device,
        chat_template=asked.chat_template,
        backend=asked.backend or "hf",
        backend_args=asked.backend_args or {},
        num_fewshot=asked.num_fewshot,
        batch_size=asked.batch_size,
        generation=asked.generation or {},
    )


@dataclass(frozen=True)
class TwinMaker:
    """Makes twins of a merge in the scratch folder."""

    plan: PlanSettings
    sidecars: SidecarSettings
    loader: ModelLoader
    statistics: StatisticsSettings | None  # None: the method needs no second moments
    sets: Sets  # calibration texts, one set per expert

    def uniform(self, schedule: DensitySchedule) -> Candidate:
        """Make the merge with the mean density everywhere, the baseline for the guide."""
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
        locations = {**loader.files.locations, **known.folders}
        shards = write_weights(planned, locations, output, loader.means, loader.progress, title)
        made = finish_model(planned, shards, self.sidecars, loader.files.sources, output)
        return Candidate(label, made.identity, made.folder)


def score_merge(
    evaluation: EvaluationPlan,
    tasks: ScoredTasks,
    merged: MergedModel,
    guidance: Guided | None,
    maker: TwinMaker,
) -> Scored:
    """Make the twins of the merge, and score it beside them and its rivals.

    Raises:
        SourceError: a rival changed since it was pinned.
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
    models, limit, settings = [*rivals, *twins], evaluation.limit, evaluation.settings
    results = score(models, tasks.loaded, limit, settings, kept, loader.progress)
    for source in loader.files.sources.values():
        require_unchanged(source)
    samples = samples_of(results, tasks, limit, evaluation.log_samples)
    data = library_of(tasks.selection).scored_data(tasks.loaded)
    return Scored(compare(results), results, data=data, samples=samples)


def score(
    candidates: Sequence[Candidate],
    loaded: LoadedTasks,
    limit: int | None,
    settings: EvaluationSettings,
    kept: Path,
    progress: Progress,
) -> Mapping[str, ModelResult]:
    """Score candidates on the same items, or use their results in `kept`; label -> results."""
    kept.mkdir(parents=True, exist_ok=True)
    progress.say("Preparing the benchmarks")
    n_items, asked, run = _runner(loaded, limit, settings)
    facts = [limit, vars(settings), asked, *scoring_facts(loaded.selection, loaded.commits)]
    files = {one.label: kept / _file_name(one, facts) for one in candidates}
    results: dict[str, ModelResult] = {}
    n_new = sum(not file.exists() for file in files.values())
    stage = progress.stage("Evaluating", n_new * n_items, "items")
    with stage as advance, reading_only_named(loaded.selection):
        for candidate in candidates:
            file = files[candidate.label]
            if not file.exists():
                result = run(candidate.folder, settings, advance)
                write_whole(file, result.to_json())
            results[candidate.label] = ModelResult.from_json(file.read_text(encoding="utf-8"))
    return results


Run = Callable[[Path, EvaluationSettings, Advance], ModelResult]


def _runner(
    loaded: LoadedTasks, limit: int | None, settings: EvaluationSettings
) -> tuple[int, str, Run]:
    """Return the number of items that a model is scored on, a digest of them, and the scorer."""
    if settings.backend == "mteb":
        tasks = loaded.tasks
        n, digest = n_documents(tasks), digest_of_items(tasks)
        return n, digest, lambda folder, *how: evaluate_embedder(folder, tasks, *how)
    benchmarks = with_prompts(loaded, limit, settings)
    n, digest = benchmarks.n_requests, benchmarks.digest
    return n, digest, lambda folder, *how: evaluate_model(folder, benchmarks, *how)


def _file_name(candidate: Candidate, facts: Sequence[object]) -> str:
    """Return a name by the model, and by all that decides its scores on the same tasks."""
    document = json.dumps([KEPT, candidate.identity, *facts])
    return f"{hashlib.sha256(document.encode()).hexdigest()[:32]}.json"


def read_scores(output: Path) -> Scores | None:
    """Return the scores of a finished merge; None if it was not scored."""
    file = output / SCORES
    return Scores.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def judge_scores(gates: Sequence[Gate], scored: Scored, repo: str | None, api: HfApi) -> Scored:
    """Return the same scores with the gate's verdict, if there are gates."""
    if not gates:
        return scored
    previous = _previous(gates, repo, api)
    return replace(scored, gate=judge(gates, scored.scores, scored.items, previous))


def judge_again(
    gates: Sequence[Gate], output: Path, repo: str | None, api: HfApi
) -> GateVerdict | None:
    """Return the verdict on an existing merge, whose published rival may have changed.

    A new verdict is written into the folder, its card and page; a signature of the folder is
    deleted, because it covers the verdict. A merge that is published already is not compared with
    itself.
    """
    verdict = read_verdict(output)
    if verdict is None or not any("previous" in gate.not_worse_than for gate in gates):
        return verdict
    asked = HubRepo.to_publish(api, repo) if repo else None
    lock = (output / LOCK).read_text(encoding="utf-8")
    scores = read_scores(output)
    if scores is None or (asked and read_text(asked, read_target(asked), LOCK) == lock):
        return verdict
    items = ModelResult.from_json((output / ITEMS).read_text(encoding="utf-8"))
    found = judge(gates, scores, items, _previous(gates, repo, api))
    if found != verdict:
        for name, told in ((CARD, gate_section), (page.FILE, page.gate_notes)):
            if (output / name).exists() and (before := told(verdict)):
                text = (output / name).read_text(encoding="utf-8")
                write_whole(output / name, text.replace(before, told(found)))
        write_whole(output / FILE, found.to_json())
        (output / SIGNATURE).unlink(missing_ok=True)
    return found


def read_verdict(folder: Path) -> GateVerdict | None:
    """Return the gate's verdict on the merge in a folder; None if there was no gate."""
    file = folder / FILE
    return GateVerdict.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def _previous(gates: Sequence[Gate], repo: str | None, api: HfApi) -> Previous:
    """Read the results of the model that was published before."""
    if repo is None or not any("previous" in gate.not_worse_than for gate in gates):
        return Previous("the published model", why="the recipe names no repo to publish to")
    asked = HubRepo.to_publish(api, repo)
    target = read_target(asked)
    if target.head is None:
        return Previous(asked.name, why="the repo does not exist yet")
    name = f"{asked.name}@{target.head}"
    text = read_text(asked, target, ITEMS)
    if text is None:
        return Previous(name, why=f"it has no {ITEMS}")
    try:
        return Previous(name, ModelResult.from_json(text))
    except EvaluationError as error:
        return Previous(name, why=f"its {ITEMS} {error.problem.rstrip('.')}")
