"""Plan unattended runs: a preflight before a download, and the request of a Hub Job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lewis_hub.errors import OutputError, PublishError, RecipeError
from lewis_hub.files import write_whole
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.jobs import MOUNT, JobRequest
from lewis_hub.hub.publish import proposals
from lewis_hub.hub.target import read_target
from lewis_hub.progress import Silent
from lewis_hub.recipe.schema import Recipe
from lewis_hub.workflow import fetch
from lewis_hub.workflow.execution import Execution
from lewis_hub.workflow.job import prepare
from lewis_hub.workflow.publish import IMPORTANCE, PreviousMerge, previous_merge, without_scores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfApi

    from lewis_hub.recipe.schema import Publishing
    from lewis_hub.report.lock import Lock


Way = Literal["unchanged", "merge", "stream"]

OUTPUT = "merged"  # in the working folder of the Job, which is deleted with the Job
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Preflight:
    """The result of a preflight.

    Attributes:
        way: `unchanged`: the target repo holds this merge already; `merge`: on this disk;
            `stream`: from Hub to Hub, because this disk is too small.
        why: the reason, as a sentence.
        commit_url: of the commit that holds the merge.
    """

    way: Way
    why: str
    commit_url: str | None = None


def look_ahead(
    recipe: Recipe, asked: Publishing, output: Path, api: HfApi, *, force: bool
) -> Preflight:
    """Compare sources, disk and target; only headers and small files are read.

    The profile of the published merge is saved in `importance/` beside the recipe, if there is no
    file yet, so that `merge` does not measure it again.

    Args:
        recipe: the recipe.
        asked: the target. A token with read access is enough; an invisible repo counts as empty.
        output: the folder that a merge on this disk would create.
        api: the Hub.
        force: whether to merge although nothing changed.

    Raises:
        CheckFailedError: the sources do not fit together.
        OutputError: the disk is too small for the whole models that the recipe needs.
    """
    job = prepare(recipe, Execution(replace=force), api, Silent())
    needs, planned = job.disk_needs(), job.planned
    try:
        fetch.require_disk(output, needs.download_bytes, needs.made_bytes)
        found = Preflight("merge", "The disk is large enough.")
    except OutputError as shortage:
        if job.evaluation and job.evaluation.demands:
            remedy = (
                "A quality gate scores whole models, so the merge cannot be streamed: use a "
                "machine with a larger disk, for example with `lewis-hub merge --push --on jobs`."
            )
            raise OutputError(shortage.path, shortage.problem, remedy) from None
        found = Preflight("stream", f"{shortage.path}: {shortage.problem}")
        planned = without_scores(planned)  # scores need whole models
    previous = previous_merge(read_target(HubRepo(api, asked.repo, error_type=PublishError)), api)
    held = None if force else _held(asked, previous, planned, api)
    if held:
        name, sha = asked.repo, held.source.commit_sha
        why = f"{name}@{sha[:8]} holds this merge already."
        return Preflight("unchanged", why, f"{api.endpoint}/{name}/commit/{sha}")
    if previous and job.guide:
        _keep_importance(job.guide.beside, previous, api)
    return found


def _held(
    asked: Publishing, main: PreviousMerge | None, planned: Lock, api: HfApi
) -> PreviousMerge | None:
    """Return the planned merge if main, or an open pull request, holds it already."""
    merges = [main]
    if asked.landing == "pull-request":
        merges += [previous_merge(target, api) for _, target in proposals(api, asked.repo)]
    return next((previous for previous in merges if previous and previous.holds(planned)), None)


def _keep_importance(folder: Path, previous: PreviousMerge, api: HfApi) -> None:
    place = folder / "importance.json"
    profile = previous.read(IMPORTANCE, api)
    if profile and not place.exists():
        place.parent.mkdir(exist_ok=True)
        write_whole(place, profile)


@dataclass(frozen=True)
class Hardware:
    """The hardware of a Job; None leaves the choice to the Hub."""

    flavor: str | None
    timeout: str | None
    namespace: str | None


def request(file: Path, recipe: Recipe, options: Sequence[str], hardware: Hardware) -> JobRequest:
    """Return the Job that merges a recipe and pushes the result; `options` are those of `merge`.

    Raises:
        RecipeError: it names models or files that a Job cannot read.
    """
    return JobRequest(
        words=["merge", MOUNT, "-o", OUTPUT, *options],
        files={RECIPE: file, **travelling(file, recipe)},
        package=f"lewis-hub=={version('lewis-hub')}",
        flavor=hardware.flavor,
        timeout=hardware.timeout,
        namespace=hardware.namespace,
    )


def travelling(file: Path, recipe: Recipe) -> Mapping[str, Path]:
    """Return the local files that a recipe names, by their path beside it.

    Raises:
        RecipeError: a model is a local folder, or a file is not beside the recipe.
    """
    for model in _models(recipe):
        if Path(recipe.locate(model)).exists():
            problem = f"`{model}` is a local folder, but a Job reads models from the Hub."
            raise RecipeError(
                str(file), "models", problem, f"Push it: `lewis-hub push {model} OWNER/NAME`."
            )
    found: dict[str, Path] = {}
    beside = file.resolve().parent
    for name in _data(recipe):
        place = Path(recipe.locate(name))
        if not place.exists():
            continue  # a repo, or a missing file, which the check reports
        if Path(name).is_absolute() or not place.is_relative_to(beside):
            problem = f"`{name}` is not beside the recipe, so a Job cannot read it."
            raise RecipeError(str(file), "", problem, "Move it there, or to a repo on the Hub.")
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {
            str(path.relative_to(beside)): path
            for path in inside
            if path.is_file() and "__pycache__" not in path.parts
        }
    return found


def _models(recipe: Recipe) -> Iterator[str]:
    if recipe.base_model:
        yield recipe.base_model.name
    for entry in recipe.experts:
        yield entry.model.name


def _data(recipe: Recipe) -> Iterator[str]:
    if recipe.evaluate and recipe.evaluate.include:
        yield recipe.evaluate.include
    for entry in recipe.experts:
        calibration = recipe.calibration_of(entry)
        named = calibration and (calibration.dataset, calibration.include)
        yield from filter(None, named or ())
