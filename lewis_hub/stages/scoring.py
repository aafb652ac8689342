"""Score one model that no recipe speaks of: as it is, or from a plain copy that is made for it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lewis_hub.evaluate.benchmarks import load_tasks
from lewis_hub.evaluate.compare import compare
from lewis_hub.evaluate.scores import Scores
from lewis_hub.evaluate.tasks import check_tasks
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress
from lewis_hub.recipe import Evaluation, ModelEntry, ModelReference, Recipe
from lewis_hub.stages.checking import examine
from lewis_hub.stages.converting import without_pickles
from lewis_hub.stages.downloading import download
from lewis_hub.stages.evaluation import Candidate, Run, score, selection, settings_of
from lewis_hub.stages.execution import Execution, Step
from lewis_hub.stages.opening import open_model
from lewis_hub.stages.sources import Inputs
from lewis_hub.stages.task_data import scored_commits
from lewis_hub.stages.writing_out import loadable

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def score_one(
    source: Source, asked: Evaluation, execution: Execution, api: HfApi, progress: Progress
) -> Scores:
    """Score one model, whole.

    Pickled weights are converted first, and quantised ones that a merge can read are scored from a
    bfloat16 copy; others are left to transformers.

    Raises:
        EvaluationError: a task or the model cannot be used.
        SourceError: a file cannot be had.
    """
    selected = selection(None, asked, allow_code=execution.allow_code)
    check_tasks(selected)
    recipe = _alone(source)
    inputs = without_pickles(recipe, Inputs(None, (source,), {}), api, progress)
    (whole,) = inputs.models
    folders = download(api, inputs.models, progress)
    settings = settings_of(asked, execution.device)
    with TemporaryDirectory() as scratch:
        folder = folders[whole.pinned]
        opened = open_model(api, whole)
        if opened.checkpoint.is_computed and not opened.problem:
            examined = examine(recipe, inputs, api, allow_code=True)
            step = Step(recipe, inputs, examined, execution, api, progress)
            folder = loadable(step, whole, folders, Path(scratch))
        candidate = Candidate(source.pinned, source.commit_sha, folder)
        loaded = load_tasks(selected, scored_commits(api, selected))
        run = Run(loaded, asked.limit, settings, Path(scratch))
        return compare(score([candidate], run, progress))


def _alone(source: Source) -> Recipe:
    """A recipe of one model, for the steps that ask for one."""
    return Recipe(
        models=(ModelEntry(model=ModelReference(name=source.name)),), merge_method="linear"
    )
