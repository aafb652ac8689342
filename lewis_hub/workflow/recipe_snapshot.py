"""The recipe as it was run: every revision pinned, its own task files beside it."""

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

TASKS = "tasks"  # where own task files lie beside lewis/recipe.yaml; further folders get numbers
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".jsonl", ".json", ".txt")


Sources = Mapping[ModelReference, Source]  # every model that a recipe names
Data = Mapping[Calibration, Source | PinnedTask]  # what each calibration draws from


@dataclass(frozen=True)
class RecipeSnapshot:
    """A recipe as it was run.

    Attributes:
        document: plain data, defaults spelt out and every revision pinned. It reads back as a
            recipe beside `lewis/tasks`, which holds the recipe's own task files.
        task_folders: folder with own task files -> where they are copied beside the document.
    """

    document: Mapping[str, Any]
    task_folders: Mapping[str, str]

    def to_yaml(self) -> str:
        """The document as text."""
        return str(yaml.safe_dump(self.document, sort_keys=False, allow_unicode=True, width=100))

    def copy_tasks(self, own: Path) -> list[str]:
        """Copy own task files into a merge's own folder; returns their paths in it."""
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
    told = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    names = {str(model): source.pinned for model, source in sources.items()}
    del told["models" if recipe.slices else "slices"]
    models = told.get("models", [])
    slices = told.get("slices", [])
    for place in (told, *slices):
        if "base_model" in place:
            place["base_model"] = names[place["base_model"]]
    for model in (*models, *(source for one in slices for source in one["sources"])):
        model["model"] = names[model["model"]]
    _pin_tokenizer(told, recipe, sources)
    places = [told, told.get("guide", {}), *models]
    drawn = [place["calibration"] for place in places if "calibration" in place]
    for calibration in drawn:
        _pin_calibration(calibration, data)
    for place in (told.get("evaluate", {}), *drawn):
        if "include" in place:
            place["include"] = task_folders[recipe.locate(place["include"])]
    return RecipeSnapshot(told, task_folders)


def _pin_calibration(told: dict[str, Any], data: Data) -> None:
    """Write a dataset's commit, or that of a task's, into a calibration as plain data.

    A calibration that nothing is drawn from stays as it was.
    """
    if "task" not in told:
        datasets = {one.dataset: found for one, found in data.items()}
        dataset = datasets.get(told["dataset"])
        told["dataset"] = dataset.pinned if isinstance(dataset, Source) else told["dataset"]
        return
    task = data.get(Calibration.model_validate(told))
    commits = set(task.commits.values()) if isinstance(task, PinnedTask) else set()
    if len(commits) == 1:
        told["revision"] = commits.pop()


def _pin_tokenizer(told: dict[str, Any], recipe: Recipe, sources: Sources) -> None:
    """Pin models that are named for their tokenizer, a token or their chat template."""

    def pin(place: dict[str, Any], key: str) -> None:
        name = place.get(key)
        if not isinstance(name, str) or name in ("base", "union"):
            return
        if model := recipe.reference(name):
            place[key] = sources[model].pinned

    pin(told, "tokenizer_source")
    pin(told, "chat_template")
    asked = told.get("tokenizer", {})
    pin(asked, "source")
    for token in asked.get("tokens", {}).values():
        pin(token, "source")
        if isinstance(token.get("source"), dict):
            pin(token["source"], "model")


def _task_folders(recipe: Recipe) -> dict[str, str]:
    """Folders with own task files -> where their files are carried beside lewis/recipe.yaml."""
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
