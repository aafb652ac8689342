"""Evaluate: every model of a merge on the same items; what is scored once is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.evaluate.benchmarks import LoadedTasks, with_prompts
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.harness import EvaluationSettings, evaluate_model
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.scores import Scores
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.methods import registry
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Evaluation, Recipe, Settings
from lewis_hub.workflow.merge import MergedModel, loadable, make, uniform_twin
from lewis_hub.workflow.resolve import needs_grams

if TYPE_CHECKING:
    from lewis_hub.guides.schedule import DensitySchedule
    from lewis_hub.workflow.calibrate import Guidance
    from lewis_hub.workflow.grams import Gathered
    from lewis_hub.workflow.job import Folders, Step


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


def selection(recipe: Recipe | None, evaluation: Evaluation, *, allow_code: bool) -> TaskSelection:
    """The tasks that are asked for, own task files found beside the recipe where there is one."""
    include = None
    if evaluation.include:
        include = Path(recipe.locate(evaluation.include) if recipe else evaluation.include)
    return TaskSelection(evaluation.tasks, include, allow_code=allow_code)


def settings_of(evaluation: Evaluation, device: str) -> EvaluationSettings:
    """How its models are run."""
    return EvaluationSettings(device=device, chat_template=evaluation.chat_template)


def has_uniform_twin(recipe: Recipe) -> bool:
    """Whether the merge is made again, with uniform densities, to be scored beside it."""
    asked = recipe.evaluate
    return recipe.guide is not None and asked is not None and "uniform" in asked.compare


def plain_twin(recipe: Recipe) -> tuple[str, Recipe] | None:
    """The label and the recipe of the same merge without statistics, to be scored beside it.

    Of a method that cannot do without it is what equal second moments would give, the mean of the
    task vectors by the same weights; else entries are trimmed by their magnitude.
    """
    asked = recipe.evaluate
    if asked is None or "uniform" not in asked.compare or not needs_grams(recipe):
        return None
    if not registry.find(recipe.merge_method).needs_grams:
        kept = {k: v for k, v in recipe.parameters.items() if k not in ("trim", "trim_exponent")}
        return "by_magnitude", recipe.model_copy(update={"parameters": kept})
    plain = registry.find("task_arithmetic")

    def known(settings: Settings) -> Settings:
        names = (*plain.settings, *plain.options)
        return {name: value for name, value in settings.items() if name in names}

    models = tuple(
        entry.model_copy(update={"parameters": known(entry.parameters)}) for entry in recipe.models
    )
    mean = {**known(recipe.parameters), "normalize": True}
    changed = {"merge_method": plain.name, "parameters": mean, "models": models}
    return plain.name, recipe.model_copy(update=changed)


def n_twins(recipe: Recipe) -> int:
    """How many times more the merge is made, to be scored beside it."""
    return has_uniform_twin(recipe) + (plain_twin(recipe) is not None)


def score_merge(
    step: Step,
    merged: MergedModel,
    guidance: Guidance | None,
    folders: Folders,
    scratch: Path,
    gather: Callable[[DensitySchedule], Gathered],
) -> Scored | None:
    """Score the merge beside what the recipe compares it with; None where it asks for nothing.

    Its twins are made for this and stay in `scratch`.

    Args:
        step: what was merged.
        merged: the merge.
        guidance: of its guide, where it has one.
        folders: of all sources.
        scratch: for what is made and found on the way.
        gather: tells the statistics of a merge with other densities.
    """
    asked = step.recipe.evaluate
    if asked is None:
        return None
    inputs, candidates = step.inputs, [Candidate("merged", merged.identity, merged.folder)]
    if plain := plain_twin(step.recipe):
        label, recipe = plain
        schedule = guidance.schedule if guidance and label == "by_magnitude" else None
        title = f"Merging its twin {label.replace('_', ' ')}"
        twin = make(replace(step, recipe=recipe), schedule, folders, scratch / label, title)
        candidates.insert(0, Candidate(label, twin.identity, twin.folder))
    if has_uniform_twin(step.recipe) and guidance:
        uniform = uniform_twin(step, guidance.schedule)
        title, output = "Merging the uniform twin", scratch / "uniform"
        known = gather(uniform)
        there = {**folders, **known.folders}
        twin = make(step, uniform, there, output, title, known.statistics)
        candidates.insert(0, Candidate("uniform", twin.identity, twin.folder))
    others = [(f"expert:{e.pinned}", e) for e in inputs.experts if "experts" in asked.compare]
    if inputs.base and "base" in asked.compare:
        others.insert(0, ("base", inputs.base))
    named = [
        Candidate(label, inputs.content(source), loadable(step, source, folders, scratch))
        for label, source in others
    ]
    settings = settings_of(asked, step.execution.device)
    run = Run(step.scored, asked.limit, settings, scratch / "scored")
    results = score([*named, *candidates], run, step.progress)
    return Scored(compare(results), results)


def score(
    candidates: Sequence[Candidate], run: Run, progress: Progress
) -> Mapping[str, ModelResult]:
    """Score the candidates on the same items; label -> what it did.

    Args:
        candidates: in the order in which they are scored.
        run: tasks, settings, and where results are kept as they come.
        progress: told the requests of all candidates together.

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
