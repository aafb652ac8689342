"""Read recipes, and change them for a command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lewis_hub.errors import GuideError, RecipeError
from lewis_hub.guides import registry
from lewis_hub.recipe import read
from lewis_hub.recipe.rules import Complaint, contradictions
from lewis_hub.recipe.schema import Calibration, Publishing, Recipe


def read_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file; relative paths inside it are looked up beside it, then in the
            working folder.

    Raises:
        RecipeError: the file is missing, is not YAML, or has contradictory settings.

    Example:
        >>> import lewis_hub
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> recipe.merge_method
        'ties'
    """
    return read.read_recipe(path, rules)


def allowing_overlap(recipe: Recipe) -> Recipe:
    """Return the same recipe with `allow_overlap: true` in every calibration."""

    def allowed(calibration: Calibration | None) -> dict[str, Calibration | None]:
        kept = calibration and calibration.model_copy(update={"allow_overlap": True})
        return {"calibration": kept}

    guide = recipe.guide
    changed = {
        "models": tuple(m.model_copy(update=allowed(m.calibration)) for m in recipe.models),
        "guide": guide and guide.model_copy(update=allowed(guide.calibration)),
        **allowed(recipe.calibration),
    }
    return recipe.model_copy(update=changed)


def rules(recipe: Recipe) -> Iterator[Complaint]:
    """Yield the contradictions of a recipe, including those of its guide."""
    yield from contradictions(recipe)
    yield from _guide_complaints(recipe)


def require_valid(recipe: Recipe) -> None:
    """Check a recipe that was not read from a file by the same rules.

    Raises:
        RecipeError: its fields contradict each other, or its guide lacks calibration data.
    """
    for where, problem, remedy in rules(recipe):
        raise RecipeError("recipe", read.dotted(where), problem, remedy)


def _guide_complaints(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.guide is None:
        return
    try:
        guide = registry.find(recipe.guide.name)
    except GuideError as error:
        yield ("guide", "name"), f"{error.where}: {error.problem}.", error.remedy
        return
    for entry in recipe.experts:
        if guide.needs_texts and recipe.calibration_of(entry) is None:
            problem = f"no calibration data for `{entry.model}`."
            yield ("guide",), problem, "Add `guide.calibration`, or `calibration` to this model."


def published_at(recipe: Recipe, repo: str) -> Recipe:
    """Return the same recipe, published in another repo."""
    asked = recipe.publish or Publishing(repo=repo)
    return recipe.model_copy(update={"publish": asked.model_copy(update={"repo": repo})})


def destination(recipe: Recipe) -> Publishing:
    """Return the publishing settings of a recipe.

    Raises:
        RecipeError: it has none.
    """
    if recipe.publish is None:
        raise RecipeError(
            "recipe",
            "publish.repo",
            "the recipe does not say where to publish.",
            "Add `publish: {repo: owner/name}`, or give --repo owner/name.",
        )
    return recipe.publish
