"""What this Space refuses in a recipe that lewis-hub itself would run.

Users of a Space share its machine. So a recipe may name repositories of the Hub and lm-eval's own
tasks, and nothing that is read from the machine's disk or sent to an address of the user's choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lewis_hub import Calibration, Evaluation, ModelReference, Recipe

REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
TASK = re.compile(r"\w[\w.+:-]*", re.ASCII)
ELSEWHERE = "lewis-hub on your own machine runs such a recipe."


def refusals(recipe: Recipe) -> Iterator[str]:
    """Yield each reason why this Space does not run a recipe."""
    if recipe.intermediate:
        yield f"a file of several merges is not run here. {ELSEWHERE}"
    if recipe.allow_code:
        yield f"`allow_code` is not allowed here: no code of a model is copied. {ELSEWHERE}"
    for model in _models(recipe):
        if model.on and model.on != recipe.base_model:
            yield f"`{model}`: an adapter needs the recipe's `base_model` here. {ELSEWHERE}"
        yield from _not_a_repo(model.name)
    for calibration in calibrations(recipe):
        if calibration.include:
            yield f"`include: {calibration.include}` is a folder, which is not read here."
        if calibration.dataset:
            yield from _not_a_repo(calibration.dataset.partition("@")[0])
        if calibration.task:
            yield from _not_a_task(calibration.task)
    if recipe.evaluate:
        yield from _scoring_refusals(recipe.evaluate)


def not_on_the_hub(*names: str) -> Iterator[str]:
    """Yield a refusal for each name, with or without a revision, that is no repo of the Hub."""
    for name in names:
        yield from _not_a_repo(name.partition("@")[0])


def _scoring_refusals(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.include:
        yield f"`include: {evaluation.include}` is a folder, which is not read here."
    if evaluation.backend or evaluation.backend_args:
        yield f"`backend` is not yours to choose here. {ELSEWHERE}"
    for task in evaluation.tasks:
        yield from _not_a_task(task)


def _not_a_repo(name: str) -> Iterator[str]:
    if not REPO.fullmatch(name):
        yield f"`{name}` is not a repository of the Hub: write owner/name. Folders are not read."


def _not_a_task(name: str) -> Iterator[str]:
    if not TASK.fullmatch(name):
        yield f"`{name}` is not the name of a task of lm-eval. Files are not read."


def _models(recipe: Recipe) -> Iterator[ModelReference]:
    """Every model that a recipe names, and the bases of adapters."""
    listed = [recipe.base_model, *(entry.model for entry in recipe.models)]
    for part in recipe.slices:
        listed += [part.base_model, *(source.model for source in part.sources)]
    listed += [expert.source_model for expert in recipe.mixed]
    for model in filter(None, listed):
        yield model
        if model.on:
            yield model.on


def calibrations(recipe: Recipe) -> Iterator[Calibration]:
    """Every calibration that a recipe describes."""
    own = [recipe.calibration, *(entry.calibration for entry in recipe.models)]
    own += [recipe.guide.calibration] if recipe.guide else []
    yield from filter(None, own)
