"""The snapshot of a recipe: every revision pinned, the user's task files beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis_hub.hub.source import Source
from lewis_hub.recipe.schema import Calibration, ModelReference, Recipe
from lewis_hub.workflow.resolve import PinnedTask

TASKS = "tasks"  # folder beside lewis/recipe.yaml; further folders get numbers
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".jsonl", ".json", ".txt")


Sources = Mapping[ModelReference, Source]  # every model that a recipe names
Data = Mapping[Calibration, Source | PinnedTask]  # the data of each calibration


@dataclass(frozen=True)
class RecipeSnapshot:
    """A recipe as it was run.

    Attributes:
        document: plain data with all defaults and pinned revisions. It can be read as a recipe
            beside the copied task files.
        task_folders: folder with the user's task files -> name of its copy beside the document.
    """

    document: Mapping[str, Any]
    task_folders: Mapping[str, str]

    def to_yaml(self) -> str:
        """Return the document as text."""
        return str(yaml.safe_dump(self.document, sort_keys=False, allow_unicode=True, width=100))

    def copy_tasks(self, own: Path) -> list[str]:
        """Copy the user's task files into a merge's folder; return their paths in it."""
        copied = []
        for folder, name in self.task_folders.items():
            source, target = Path(folder), own / name
            for file in sorted(source.rglob("*")):
                part = file.relative_to(source)
                is_task = file.suffix in TASK_SUFFIXES and "__pycache__" not in part.parts
                if file.is_file() and is_task:
                    (target / part).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target / part)
                    copied.append(f"{name}/{part.as_posix()}")
        return copied


def snapshot(recipe: Recipe, sources: Sources, data: Data) -> RecipeSnapshot:
    """Pin every revision of a recipe."""
    task_folders = _task_folders(recipe)
    document = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    names = {str(model): source.pinned for model, source in sources.items()}
    del document["models" if recipe.slices else "slices"]
    models = document.get("models", [])
    slices = document.get("slices", [])
    for place in (document, *slices):
        if "base_model" in place:
            place["base_model"] = names[place["base_model"]]
    for model in (*models, *(source for one in slices for source in one["sources"])):
        model["model"] = names[model["model"]]
    _pin_tokenizer(document, recipe, sources)
    places = [document, document.get("guide", {}), *models]
    drawn = [place["calibration"] for place in places if "calibration" in place]
    for calibration in drawn:
        _pin_calibration(calibration, data)
    for place in (document.get("evaluate", {}), *drawn):
        if "include" in place:
            place["include"] = task_folders[recipe.locate(place["include"])]
    return RecipeSnapshot(document, task_folders)


def _pin_calibration(calibration: dict[str, Any], data: Data) -> None:
    """Write the commit of a dataset or task into a calibration; unused calibrations stay."""
    if "task" not in calibration:
        datasets = {one.dataset: found for one, found in data.items()}
        dataset = datasets.get(calibration["dataset"])
        if isinstance(dataset, Source):
            calibration["dataset"] = dataset.pinned
        return
    task = data.get(Calibration.model_validate(calibration))
    commits = set(task.commits.values()) if isinstance(task, PinnedTask) else set()
    if len(commits) == 1:
        calibration["revision"] = commits.pop()


def _pin_tokenizer(document: dict[str, Any], recipe: Recipe, sources: Sources) -> None:
    """Pin models that are named as source of the tokenizer, a token or the chat template."""

    def pin(place: dict[str, Any], key: str) -> None:
        name = place.get(key)
        if not isinstance(name, str) or name in ("base", "union"):
            return
        if model := recipe.reference(name):
            place[key] = sources[model].pinned

    pin(document, "tokenizer_source")
    pin(document, "chat_template")
    asked = document.get("tokenizer", {})
    pin(asked, "source")
    for token in asked.get("tokens", {}).values():
        pin(token, "source")
        if isinstance(token.get("source"), dict):
            pin(token["source"], "model")


def _task_folders(recipe: Recipe) -> dict[str, str]:
    """Return the folders with the user's task files -> name of the copy."""
    guide = recipe.guide.calibration if recipe.guide else None
    places = [
        recipe.evaluate,
        recipe.calibration,
        guide,
        *(entry.calibration for entry in recipe.models),
    ]
    named = [place.include for place in places if place and place.include]
    folders = dict.fromkeys(map(recipe.locate, named))
    return {folder: f"{TASKS}{n or ''}" for n, folder in enumerate(folders)}
