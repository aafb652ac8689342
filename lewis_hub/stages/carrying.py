"""Carry what a recipe calibrates and evaluates on, so that it can be run again where it lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.sources import Inputs

TASKS = "tasks"  # where own task files lie beside lewis/recipe.yaml; further folders get numbers
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".jsonl", ".json", ".txt")


def pin_calibration(told: dict[str, Any], inputs: Inputs) -> None:
    """Write a dataset's commit, or that of a task's, into a calibration as plain data.

    One that nothing is drawn from stays as it was.
    """
    if "task" not in told:
        dataset = inputs.datasets.get(told["dataset"])
        told["dataset"] = dataset.pinned if dataset else told["dataset"]
        return
    task = inputs.tasks.get(Calibration.model_validate(told))
    commits = set(task.commits.values()) if task else set()
    if len(commits) == 1:
        told["revision"] = commits.pop()


def task_folders(recipe: Recipe) -> dict[str, str]:
    """Folders with own task files -> where their files are carried beside lewis/recipe.yaml."""
    guide = recipe.guide.calibration if recipe.guide else None
    places = [recipe.evaluate, guide, *(entry.calibration for entry in recipe.models)]
    named = [place.include for place in places if place and place.include]
    folders = dict.fromkeys(map(recipe.locate, named))
    return {folder: f"{TASKS}{n or ''}" for n, folder in enumerate(folders)}


def carry_tasks(recipe: Recipe, own: Path) -> list[str]:
    """Copy own task files into a merge's own folder; returns their paths in it."""
    carried = []
    for folder, name in task_folders(recipe).items():
        source, target = Path(folder), own / name
        for file in sorted(source.rglob("*")):
            part = file.relative_to(source)
            if file.is_file() and file.suffix in TASK_SUFFIXES and "__pycache__" not in part.parts:
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / part)
                carried.append(f"{name}/{part.as_posix()}")
    return carried
