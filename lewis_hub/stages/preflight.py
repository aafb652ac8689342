"""Preflight: what a run that nobody watches is to do, known before a weight is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lewis_hub.errors import OutputError, PublishError
from lewis_hub.files import write_whole
from lewis_hub.hub.failures import Asked
from lewis_hub.hub.publish import proposals
from lewis_hub.hub.target import look
from lewis_hub.progress import Silent
from lewis_hub.recipe import Recipe
from lewis_hub.stages import checking, downloading, reporting
from lewis_hub.stages.execution import Execution, Step
from lewis_hub.stages.sources import resolve_inputs
from lewis_hub.stages.standing import IMPORTANCE, Former, former_merge

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.recipe import Publishing
    from lewis_hub.report.lock import Lock

Way = Literal["unchanged", "merge", "stream"]


@dataclass(frozen=True)
class Preflight:
    """What is to be done.

    Attributes:
        way: `unchanged`: nothing, the target repo holds this very merge; `merge`: on this disk;
            `stream`: from Hub to Hub, since this disk is too small.
        why: in words.
        commit_url: of the commit that holds the merge.
    """

    way: Way
    why: str
    commit_url: str | None = None


def look_ahead(
    recipe: Recipe, asked: Publishing, output: Path, api: HfApi, *, force: bool
) -> Preflight:
    """Look at sources, disk and target; only headers and small files are read.

    What the target's merge measured is left in `importance/`, beside the recipe or in the working
    folder, unless there is a file already: `merge` need not measure it again then.

    Args:
        recipe: what to merge.
        asked: where it goes. The target is only read, so a token that may read is enough; one that
            cannot be seen counts as empty.
        output: the folder that a merge on this disk would make.
        api: the Hub.
        force: whether to merge though nothing changed.

    Raises:
        CheckFailedError: the sources do not fit together.
        OutputError: the disk is too small, and what the recipe asks for needs whole models.
    """
    inputs = resolve_inputs(recipe, api)
    examined = checking.examine(recipe, inputs, api, allow_code=False)
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, Execution(), api, Silent())
    try:
        downloading.require_disk(step, output)
        found = Preflight("merge", "The disk is large enough.")
    except OutputError as shortage:
        _require_streamable(recipe, shortage)
        recipe = recipe.model_copy(update={"evaluate": None})  # scores need whole models
        found = Preflight("stream", f"{shortage.path}: {shortage.problem}")
    former = former_merge(look(Asked(api, asked.repo, kind=PublishError)), api)
    planned = reporting.lock(recipe, inputs, step.execution.max_shard_bytes, {})
    held = None if force else _held(asked, former, planned, api)
    if held:
        name, sha = asked.repo, held.source.commit_sha
        why = f"{name}@{sha[:8]} holds this merge already."
        return Preflight("unchanged", why, f"{api.endpoint}/{name}/commit/{sha}")
    if former and recipe.guide:
        _keep_importance(recipe, former, api)
    return found


def _require_streamable(recipe: Recipe, shortage: OutputError) -> None:
    if recipe.evaluate and recipe.evaluate.gate:
        remedy = (
            "A quality gate scores whole models, so the merge cannot be streamed past this disk: "
            "take a larger machine, such as by `lewis-hub merge --push --on jobs`."
        )
        raise OutputError(shortage.path, shortage.problem, remedy)


def _held(asked: Publishing, main: Former | None, planned: Lock, api: HfApi) -> Former | None:
    """The planned merge where it lies on main, or in an open pull request if it would be one."""
    formers = [main]
    if asked.landing == "pull-request":
        formers += [former_merge(target, api) for _, target in proposals(api, asked.repo)]
    return next((former for former in formers if former and former.holds(planned)), None)


def _keep_importance(recipe: Recipe, former: Former, api: HfApi) -> None:
    place = Path(recipe.locate("importance")) / "importance.json"
    told = former.read(IMPORTANCE, api)
    if told and not place.exists():
        place.parent.mkdir(exist_ok=True)
        write_whole(place, told)
