"""A recipe as it was run, with the user's task files: both become part of the merge."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis_hub.errors import RecipeError, SourceError
from lewis_hub.evaluate.benchmarks import own_files
from lewis_hub.evaluate.embedding_tasks import own_task_files
from lewis_hub.files import sha256_of
from lewis_hub.hub.source import RESTORE, Source, local_reading, state_of
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.parts import all_of
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.report.lock import OutputFile
from lewis_hub.workflow.resolve import Inputs, by_reference, calibrations_in
from lewis_hub.workflow.task_data import PinnedTask

TASKS = "tasks"  # folder beside lewis/recipe.yaml; further folders get numbers


@dataclass(frozen=True)
class OwnTaskFile:
    """A file of the user that the tasks of a recipe use, as it was when the recipe was read."""

    file: Path
    output: OutputFile  # what a lock states of its copy
    state: str  # as `state_of` says


@dataclass(frozen=True)
class RecipeSnapshot:
    """A recipe as it was run."""

    # plain data with all defaults and pinned revisions. It can be read as a recipe beside the
    # copied task files.
    document: Mapping[str, Any]
    task_files: Mapping[str, OwnTaskFile]  # by path beside it

    @property
    def outputs(self) -> dict[str, OutputFile]:
        """Return what a lock states of the task files."""
        return {f"lewis/{path}": one.output for path, one in self.task_files.items()}

    def to_yaml(self) -> str:
        """Return the document as text."""
        return str(yaml.safe_dump(self.document, sort_keys=False, allow_unicode=True, width=100))

    def copy_tasks(self, own: Path) -> list[str]:
        """Copy the user's task files into a merge's folder; return their paths in it.

        Raises:
            SourceError: a file is not what it was when the recipe was read.
        """
        for path, one in self.task_files.items():
            (own / path).parent.mkdir(parents=True, exist_ok=True)
            with local_reading(str(one.file.parent)):
                shutil.copyfile(one.file, own / path)
            if (sha256_of(own / path), state_of(one.file)) != (one.output.sha256, one.state):
                problem = f"`{one.file.name}` changed while it was used"
                raise SourceError(str(one.file.parent), problem, RESTORE)
        return [*self.task_files]


def snapshot(recipe: Recipe, inputs: Inputs) -> RecipeSnapshot:
    """Pin every revision of a recipe."""
    copies = _copies(_own_tasks(recipe))
    document = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    _drop_empty(document)
    sources = by_reference(recipe, inputs.base, inputs.experts)
    names = {str(model): source.pinned for model, source in sources.items()}
    models = document.get("models", [])
    slices = document.get("slices", [])
    for place in (document, *slices):
        if "base_model" in place:
            place["base_model"] = names[place["base_model"]]
    for model in (*models, *(source for one in slices for source in one["sources"])):
        model["model"] = names[model["model"]]
    for expert in (*document.get("experts", []), *document.get("shared_experts", [])):
        expert["source_model"] = names[expert["source_model"]]
    _pin_tokenizer(document, recipe, names)
    for calibration in _drawn(document):
        _pin_calibration(calibration, inputs.data)
    document.get("evaluate", {}).get("backend_args", {}).pop("base_url", None)  # of this machine
    steps = [calibration for one in _with_steps(document) for calibration in _drawn(one)]
    for place in (document.get("evaluate", {}), *steps):
        if "include" in place:
            place["include"] = copies[recipe.locate(place["include"])]
    files = {path: _as_it_is(file) for path, file in task_files(recipe).items()}
    return RecipeSnapshot(document, files)


def _as_it_is(file: Path) -> OwnTaskFile:
    state = state_of(file)  # before it is read: a later write changes it
    return OwnTaskFile(file, OutputFile(sha256_of(file), file.stat().st_size), state)


def task_files(recipe: Recipe) -> dict[str, Path]:
    """Return the user's files that the tasks of a recipe use, by their path beside its copy."""
    own = _own_tasks(recipe)
    copies = _copies(own)
    files = {
        f"{copies[folder]}/{path}": file
        for folder, names in own.items()
        for path, file in own_files(names, Path(folder)).items()
    }
    scoring = recipe.evaluate
    if scoring and scoring.backend == "mteb" and scoring.include:
        folder = recipe.locate(scoring.include)
        found = own_task_files(scoring.tasks, Path(folder))
        files |= {f"{copies[folder]}/{path}": file for path, file in found.items()}
    return files


def _drawn(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calibrations in the document of a recipe."""
    places = [document, document.get("guide", {}), *document.get("models", [])]
    return [place["calibration"] for place in places if "calibration" in place]


def _with_steps(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The document of a recipe, and those of the merges that it uses."""
    yield document
    for part in document.get("intermediate", ()):
        yield from _with_steps(part)


def _drop_empty(document: dict[str, Any]) -> None:
    """Delete lists that a recipe may not have empty, also of the merges that it uses."""
    for key in ("models", "slices", "intermediate"):
        if not document[key]:
            del document[key]
    for part in document.get("intermediate", ()):
        _drop_empty(part)


def _pin_calibration(
    calibration: dict[str, Any], data: Mapping[Calibration, Source | PinnedTask]
) -> None:
    """Write the commit of a dataset or task into a calibration; unused calibrations stay."""
    if "task" not in calibration:
        datasets = {one.dataset: found for one, found in data.items()}
        dataset = datasets.get(calibration.get("dataset"))
        if isinstance(dataset, Source):
            calibration["dataset"] = dataset.pinned
        return
    task = data.get(Calibration.model_validate(calibration))
    commits = set(task.commits.values()) if isinstance(task, PinnedTask) else set()
    if len(commits) == 1:
        calibration["revision"] = commits.pop()


def _pin_tokenizer(document: dict[str, Any], recipe: Recipe, names: Mapping[str, str]) -> None:
    """Pin models that are named as source of the tokenizer, a token or the chat template."""
    by_name = recipe.by_name

    def pin(place: dict[str, Any], key: str) -> None:
        name = place.get(key)
        if not isinstance(name, str) or name in ("base", "union"):
            return
        if name in by_name:
            place[key] = names[str(by_name[name])]

    pin(document, "tokenizer_source")
    pin(document, "chat_template")
    asked = document.get("tokenizer", {})
    pin(asked, "source")
    for token in asked.get("tokens", {}).values():
        pin(token, "source")
        if isinstance(token.get("source"), dict):
            pin(token["source"], "model")


def _copies(folders: Iterable[str]) -> dict[str, str]:
    """Return the name of each folder's copy in the merge."""
    return {folder: f"{TASKS}{n or ''}" for n, folder in enumerate(folders)}


def _own_tasks(recipe: Recipe) -> dict[str, list[str]]:
    """Return the folders with the user's task files, and the tasks that a recipe names, or a step.

    The files go into the merge, which may be published, so they must be the recipe's own.
    """
    texts = [calibration for one in all_of(recipe) for calibration in calibrations_in(one)]
    found: defaultdict[str, list[str]] = defaultdict(list)
    for place in (recipe.evaluate, *texts):
        if place is None or place.include is None:
            continue
        folder, beside = recipe.locate(place.include), recipe.locate(".")
        if Path(folder).is_dir() and not Path(folder).is_relative_to(beside):
            problem = f"{folder} is not in the recipe's folder {beside}, and the task files that "
            problem += "are used become part of the merge."
            raise RecipeError("recipe", "include", problem, "Move or copy the folder there.")
        if Path(folder).is_dir() and Path(folder).samefile(beside):
            problem = (
                "it is the recipe's folder, where merges are written with copies of the files."
            )
            remedy = "Move the task files into a folder of their own, such as `tasks`."
            raise RecipeError("recipe", "include", problem, remedy)
        found[folder] += place.tasks if isinstance(place, Evaluation) else [str(place.task)]
    return found
