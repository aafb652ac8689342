"""One step of the pipeline alone, for a model that is there already: score, verify, publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lewis_hub.errors import RecipeError
from lewis_hub.evaluate.scores import Scores
from lewis_hub.hub.publish import Published
from lewis_hub.pipeline import merge_models
from lewis_hub.progress import Progress, Silent
from lewis_hub.recipe import Evaluation, ModelReference, Publishing, Recipe
from lewis_hub.stages import publishing, scoring, verification
from lewis_hub.stages.execution import Execution
from lewis_hub.stages.publishing import Destination
from lewis_hub.stages.sources import hub_api, resolve_one
from lewis_hub.stages.verification import Verdict


def evaluate_model(
    model: ModelReference,
    asked: Evaluation,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score one model on lm-eval tasks.

    Args:
        model: a repo, repo@revision or folder.
        asked: tasks, own task files and limit.
        execution: device, and whether benchmarks may run code.
        progress: told how far it is; None: nobody is.

    Raises:
        LewisHubError: the model or a task cannot be used.

    Example:
        >>> tasks = str(lewis_hub.zoo_folder() / "tasks")
        >>> asked = lewis_hub.Evaluation(tasks=("zoo_reverse",), include=tasks, limit=5)
        >>> model = lewis_hub.ModelReference(name="zoo/expert-reverse")
        >>> scores = lewis_hub.evaluate_model(model, asked)
        >>> scores.tasks["zoo_reverse"].n
        5
    """
    execution, progress = execution or Execution(), progress or Silent()
    execution.require_usable()
    api = hub_api()
    source = resolve_one(model, api, allow_pickle=execution.allow_pickle)
    return scoring.score_one(source, asked, execution, api, progress)


def verify(
    model: ModelReference,
    execution: Execution | None = None,
    progress: Progress | None = None,
    *,
    rebuild: bool = False,
    public_key: Path | None = None,
) -> Verdict:
    """Hold a merged model against its lock; nothing of it is run or loaded.

    Args:
        model: a repo, repo@revision or folder that a merge made.
        execution: how to make it again.
        progress: told how far it is; None: nobody is.
        rebuild: also make the merge again from the lock alone, and compare the bytes of all that
            is loaded.
        public_key: PEM file of the key that it must be signed with; None: no signature is looked
            into.

    Raises:
        LewisHubError: there is no lock, it was changed, or a source is no longer there.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> plain = recipe.model_copy(update={"evaluate": None, "guide": None})
        >>> merged = lewis_hub.merge_models(plain, tmp_path / "merged")
        >>> lewis_hub.verify(lewis_hub.ModelReference(name=str(merged.output))).problems
        ()
    """
    progress, api = progress or Silent(), hub_api()
    execution = execution or Execution()
    source = resolve_one(model, api)
    lock = verification.read_lock(source, api)
    verdict = verification.verify_files(source, lock, api, progress, public_key)
    if not rebuild:
        return verdict
    with TemporaryDirectory() as folder:
        recipe = verification.recipe_of(lock, source, allow_code=execution.allow_code)
        same = replace(execution, max_shard_bytes=lock.max_shard_bytes)
        made = merge_models(recipe, Path(folder) / "merged", same, progress)
        again = verification.read_lock(resolve_one(ModelReference(name=str(made.output)), api), api)
    differing = verification.compare_models(lock, again)
    return replace(verdict, problems=(*verdict.problems, *differing))


def published_at(recipe: Recipe, repo: str) -> Recipe:
    """The same recipe, to be published in another repo."""
    asked = recipe.publish or Publishing(repo=repo)
    return recipe.model_copy(update={"publish": asked.model_copy(update={"repo": repo})})


def destination(recipe: Recipe) -> Publishing:
    """Where a recipe wants to be published.

    Raises:
        RecipeError: it does not say.
    """
    if recipe.publish is None:
        raise RecipeError(
            "recipe",
            "publish.repo",
            "the recipe does not say where to publish.",
            "Add `publish: {repo: owner/name}`, or give --repo owner/name.",
        )
    return recipe.publish


def open_target(asked: Publishing) -> Destination:
    """Look at the repo that will be pushed to, before any work.

    Raises:
        PublishError: no token, one that may not write there, or no such namespace.
    """
    return publishing.open_destination(asked, hub_api())


def publish(
    folder: Path, target: Destination, progress: Progress | None = None, *, force: bool = False
) -> Published:
    """Push a merged model in one commit, or in none where nothing changed.

    What the quality gate refused becomes a pull request where the gate says so.

    Args:
        folder: what `merge` made.
        target: from `open_target`, before the work began: what somebody pushed to the repo since
            then is never overwritten.
        progress: told how far it is; None: nobody is.
        force: push what the quality gate refused, as if it had passed.

    Raises:
        PublishError: the repo is as it was before, or lacks the tag alone.
        GateRefusedError: so it is here.

    Example:
        >>> target = lewis_hub.open_target(lewis_hub.Publishing(repo=f"{user}/my-merge"))
        >>> folder = lewis_hub.zoo_folder() / "base"
        >>> published = lewis_hub.publish(folder, target)
        >>> published.changed, lewis_hub.publish(folder, target).changed
        (True, False)
    """
    return publishing.push(folder, target, hub_api(), progress or Silent(), force=force)
