"""Check calibration data before a large download: splits, columns, and what tasks may do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lewis_hub.errors import CalibrationError, EvaluationError, SourceError
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.guides import registry
from lewis_hub.guides.template import check_columns
from lewis_hub.hub.rows import describe, load_rows
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.sources import Inputs, merged_entries

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SMALL_BYTES = 20_000_000  # of a dataset: then its rows are read to see their columns


def data_problems(recipe: Recipe, inputs: Inputs, api: HfApi, *, allow_code: bool) -> list[str]:
    """What is known to be wrong with the calibration data; nothing where no guide measures."""
    if recipe.guide is None or "importance" not in registry.find(recipe.guide.name).needs:
        return []
    asked = (recipe.calibration_of(entry) for entry in merged_entries(recipe))
    return [
        problem
        for calibration in dict.fromkeys(one for one in asked if one)
        for problem in _problems(api, calibration, inputs, allow_code=allow_code)
    ]


def _problems(
    api: HfApi, calibration: Calibration, inputs: Inputs, *, allow_code: bool
) -> Iterator[str]:
    data = inputs.data_of(calibration)
    try:
        if isinstance(data, Source):
            check_columns(calibration, _columns(api, calibration, data))
        else:
            _check_task(replace(data.selection, allow_code=allow_code), calibration)
    except (CalibrationError, EvaluationError, SourceError) as error:
        yield str(error)


def _columns(api: HfApi, calibration: Calibration, source: Source) -> tuple[str, ...]:
    """Of the split; none where only many rows would tell."""
    told = describe(api, source, calibration.config, calibration.split)
    n_bytes = sum(file.size_bytes for file in source.files)
    if told.columns or n_bytes > SMALL_BYTES:
        return told.columns
    return load_rows(api, source, calibration.config, calibration.split).columns


def _check_task(selection: TaskSelection, calibration: Calibration) -> None:
    """What its files tell; whether its data have the split shows when they are loaded."""
    for file in locate_tasks(selection).files:
        splits = [file.config.get(f"{kind}_split") for kind in ("training", "fewshot")]
        scored = file.config.get("test_split") or file.config.get("validation_split")
        if scored == calibration.split and not calibration.allow_overlap:
            listed = " or ".join(f"`{one}`" for one in dict.fromkeys(filter(None, splits)))
            problem = f"`{scored}` is the split that it scores, and calibration must not see it."
            remedy = f"Set `split` to {listed}." if listed else "Name a `dataset` instead."
            raise EvaluationError(file.name, problem, remedy)
