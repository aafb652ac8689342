"""Differ: two merges, two recipes, or a merge and the recipe that would replace it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.recipe import ModelReference, Recipe
from lewis_hub.report.difference import differences, recipe_differences
from lewis_hub.report.lock import Lock
from lewis_hub.stages.reading import read_recipe
from lewis_hub.stages.reporting import lock
from lewis_hub.stages.sources import resolve_inputs, resolve_one
from lewis_hub.stages.verification import read_lock

if TYPE_CHECKING:
    from huggingface_hub import HfApi

RECIPES = (".yaml", ".yml")


def tell_differences(before: str, after: str, api: HfApi) -> tuple[str, ...]:
    """What differs, in words; of two recipes what they say, without asking the Hub.

    A recipe beside a merge stands for the merge that it would make now, so that inputs that moved
    are told.

    Args:
        before: a recipe file, or a folder, repo or repo@revision that a merge made.
        after: likewise.
        api: the Hub.

    Raises:
        LewisHubError: one cannot be found or read.
    """
    old, new = _recipe(before), _recipe(after)
    if old and new:
        return tuple(recipe_differences(_told(old), _told(new)))
    if old:
        made = _made(after, api)
        return differences(_planned(old, made, api), made)
    made = _made(before, api)
    return differences(made, _planned(new, made, api) if new else _made(after, api))


def _recipe(name: str) -> Recipe | None:
    return read_recipe(name) if Path(name).suffix in RECIPES else None


def _told(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def _made(name: str, api: HfApi) -> Lock:
    return read_lock(resolve_one(ModelReference.model_validate(name), api), api)


def _planned(recipe: Recipe, like: Lock, api: HfApi) -> Lock:
    inputs = resolve_inputs(recipe, api, allow_pickle=True)
    return lock(recipe, inputs, like.max_shard_bytes, {})
