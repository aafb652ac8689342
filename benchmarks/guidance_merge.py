"""One merge of `guidance.py`, in this process: what earlier ones measured is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lewis_hub.workflow.gather import gather

from lewis_hub.progress import Silent
from lewis_hub.recipe.schema import Recipe
from lewis_hub.workflow import calibrate, check, fetch, merge
from lewis_hub.workflow.execution import Execution, Step
from lewis_hub.workflow.resolve import hub_api, read_recipe, resolve_inputs


def make(told: Mapping[str, Any], store: Path, output: Path) -> None:
    """Merge as `lewis_hub.merge_models` does, without card, lock and scores.

    Args:
        told: a recipe, in its own words, with whole paths.
        store: where measurements stay, each with all that fixes it.
        output: folder for the weights.
    """
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(json.dumps(told))
        step = _step(read_recipe(file))
        sets, folders = calibrate.calibration_sets(step), fetch.everything(step)
        schedule = None
        if step.recipe.guide:
            store.mkdir(parents=True, exist_ok=True)
            stores = [store / "importance.json"]
            schedule = calibrate.guide(step, sets, folders, Path(scratch), stores).schedule
        known = gather(step, sets, folders, Path(scratch), schedule, store)
        places = {**folders, **known.folders}
        merge.make(step, schedule, places, output, "Merging", known.statistics)


def _step(recipe: Recipe) -> Step:
    api, execution = hub_api(), Execution(runner="inline")
    inputs = resolve_inputs(recipe, api)
    examined = check.examine(recipe, inputs, api, allow_code=False)
    check.require_fine(examined.report)
    return Step(recipe, inputs, examined, execution, api, Silent())
