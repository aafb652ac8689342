"""Write a recipe for a base and its experts, with comments, which a user then edits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import RecipeError

if TYPE_CHECKING:
    from lewis_hub.evaluate.tasks import LocatedTasks

ONE_PER_EXPERT = "give --task or --calibration once for each expert, in their order"
BY_STATISTICS = "`regmean`, which keeps more of each expert's skill"


@dataclass(frozen=True)
class Outline:
    """What a new recipe is about.

    Attributes:
        base: repo, repo@revision or folder of the model that the experts were fine-tuned from.
        experts: the fine-tuned models.
        tasks: lm-eval tasks to score; one for each expert, in their order, also calibrate.
        include: folder with own task files, relative to the recipe's folder.
        datasets: calibration datasets: none, one for all experts, or one for each.
        text: template over the columns of the datasets.
        repo: owner/name to publish to.
    """

    base: str
    experts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    include: str | None = None
    datasets: tuple[str, ...] = ()
    text: str = "{question} {answer}"
    repo: str | None = None

    @property
    def problem(self) -> str | None:
        """Why no recipe can be written; None if one can."""
        if len(self.datasets) in {0, 1, len(self.experts)}:
            return None
        return (
            "expected one --calibration for all experts or one for each of the "
            f"{len(self.experts)}, found {len(self.datasets)}."
        )


@dataclass(frozen=True)
class Draft:
    """A new recipe; `note` says why it is not the best for its experts, and what it would take."""

    text: str
    note: str | None


@dataclass(frozen=True)
class Texts:
    """The calibration of a new recipe: none, one for all experts, or one for each."""

    calibrations: tuple[Mapping[str, str], ...]
    note: str | None


def draft_recipe(outline: Outline, folder: Path | str = ".") -> Draft:
    """Write a recipe with comments, by `regmean` if each expert has calibration texts of its own.

    Args:
        outline: the models, and what they are good at.
        folder: the recipe's folder, which contains the folder of own task files.

    Raises:
        RecipeError: the numbers of experts and datasets do not fit.
        EvaluationError: lm-eval knows no such task; the message names the nearest.

    Example:
        >>> outline = lewis_hub.Outline("zoo/base", ("zoo/expert-reverse", "zoo/expert-cipher"))
        >>> draft = lewis_hub.draft_recipe(outline)
        >>> draft.text.splitlines()[4].partition("  #")[0]
        'base_model: "zoo/base"'
    """
    if outline.problem:
        raise RecipeError("recipe", "calibration", outline.problem, "Name one dataset, or all.")
    located = _located(outline, Path(folder))
    found = _texts(outline, [located[task] for task in outline.tasks])
    text = render(
        "recipe.yaml.j2",
        base=outline.base,
        experts=outline.experts,
        tasks=outline.tasks,
        include=outline.include,
        calibrations=found.calibrations,
        experts_calibrate=len(found.calibrations) == len(outline.experts) > 1,
        gate=_gate(located),
        repo=outline.repo,
    )
    return Draft(text, found.note)


def _located(outline: Outline, folder: Path) -> dict[str, LocatedTasks]:
    """Find the files of each task; an unknown one is an error that names the nearest."""
    if not outline.tasks:
        return {}
    from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

    include = folder / outline.include if outline.include else None
    return {
        task: locate_tasks(TaskSelection((task,), include, allow_code=True))
        for task in dict.fromkeys(outline.tasks)
    }


def _texts(outline: Outline, scored: Sequence[LocatedTasks]) -> Texts:
    """Calibrate on the named datasets, or on the training items of a task per expert."""
    n_experts, text = len(outline.experts), outline.text
    if datasets := outline.datasets:
        settings = tuple({"dataset": name, "split": "train", "text": text} for name in datasets)
        shared = f"all experts share one dataset; for {BY_STATISTICS}, {ONE_PER_EXPERT}."
        return Texts(settings, shared if len(datasets) < n_experts else None)
    if n_experts == 1:
        needed = "give --calibration DATASET, with texts like those of the benchmark."
        return _without_texts(f"there are no calibration texts; for the guide `lewis`, {needed}")
    if len(scored) != n_experts:
        named = f"{n_experts} experts, {len(scored)} tasks and no calibration dataset"
        return _without_texts(f"there are {named}; for {BY_STATISTICS}, {ONE_PER_EXPERT}.")
    from lewis_hub.evaluate.benchmarks import free_split

    splits = [(files.selection.names[0], free_split(files)) for files in scored]
    if used_up := dict.fromkeys(f"`{task}`" for task, split in splits if split is None):
        has = f"{', '.join(used_up)} {'has' if len(used_up) == 1 else 'have'}"
        needed = "give --calibration DATASET once for each expert, in their order."
        return _without_texts(
            f"{has} no split with examples that is not scored; for {BY_STATISTICS}, {needed}"
        )
    return Texts(tuple({"task": task, "split": str(split)} for task, split in splits), None)


def _without_texts(why: str) -> Texts:
    return Texts((), f"the guide is `magnitude`, which reads only weights, because {why}")


def _gate(located: Mapping[str, LocatedTasks]) -> tuple[str, str]:
    """A task and one of its metrics for the hint on gates; words to replace if none is known."""
    for task, files in located.items():
        from lewis_hub.evaluate.tasks import declared_metrics

        if metrics := declared_metrics(files, task):
            return task, metrics[0]
    return next(iter(located), "TASK"), "METRIC,FILTER"


def render(template: str, **values: object) -> str:
    """Render a template, in which `[[ ]]` holds a value: GitHub's expressions use `{{ }}`."""
    import jinja2

    environment = jinja2.Environment(
        variable_start_string="[[",
        variable_end_string="]]",
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["yaml"] = _quoted
    source = resources.files("lewis_hub.templates").joinpath(template).read_text("utf-8")
    return environment.from_string(source).render(values)


def _quoted(value: object) -> str:
    """A value in one line of YAML, in which U+0085, U+2028 and U+2029 would end a comment."""
    written = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", written)
