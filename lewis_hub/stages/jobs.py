"""Jobs: a recipe with all that it names, and the command that merges it on the Hub's machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub import __version__
from lewis_hub.errors import RecipeError
from lewis_hub.hub.jobs import MOUNT, JobRequest
from lewis_hub.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTPUT = "merged"  # in the working folder of the Job's machine, and gone with it
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Hardware:
    """Where a Job runs; None leaves the choice to the Hub."""

    flavor: str | None
    timeout: str | None
    namespace: str | None


def request(file: Path, recipe: Recipe, options: Sequence[str], hardware: Hardware) -> JobRequest:
    """The Job that merges a recipe and pushes the result.

    Args:
        file: the recipe's.
        recipe: what it says.
        options: of `merge`, to be handed on.
        hardware: where it runs.

    Raises:
        RecipeError: it names models or files that a Job cannot have.
    """
    return JobRequest(
        words=["merge", MOUNT, "-o", OUTPUT, *options],
        files={RECIPE: file, **travelling(file, recipe)},
        package=f"lewis-hub=={__version__}",
        flavor=hardware.flavor,
        timeout=hardware.timeout,
        namespace=hardware.namespace,
    )


def travelling(file: Path, recipe: Recipe) -> Mapping[str, Path]:
    """The local files that a recipe names, by their path beside it.

    Raises:
        RecipeError: a model is a local folder, or a file does not lie beside the recipe.
    """
    for model in _models(recipe):
        if Path(recipe.locate(model)).exists():
            problem = f"`{model}` is a folder of this machine, and a Job reads models from the Hub."
            raise RecipeError(str(file), "models", problem, f"`lewis-hub push {model} OWNER/NAME`.")
    found: dict[str, Path] = {}
    beside = file.resolve().parent
    for name in _data(recipe):
        place = Path(recipe.locate(name))
        if not place.exists():
            continue  # a repo, or what the check will not find either
        if Path(name).is_absolute() or not place.is_relative_to(beside):
            problem = f"`{name}` does not lie beside the recipe, so a Job cannot have it."
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
        told = calibration and (calibration.dataset, calibration.include)
        yield from filter(None, told or ())
