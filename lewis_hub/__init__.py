"""Merge language models by layer-wise sparsity, score the result and publish it.

Every public name is here; its module is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lewis_hub.demo.zoo import zoo_folder
    from lewis_hub.errors import LewisHubError
    from lewis_hub.pipeline import (
        calibrate,
        check,
        merge_models,
        open_target,
        publish,
        stream,
        verify,
    )
    from lewis_hub.recipe.schema import (
        Calibration,
        Evaluation,
        Gate,
        Guide,
        ModelEntry,
        ModelReference,
        Publishing,
        Recipe,
    )
    from lewis_hub.report.profiles import compare_profiles
    from lewis_hub.tune.objective import Search
    from lewis_hub.tune.run import tune_recipe
    from lewis_hub.workflow.resolve import read_recipe
    from lewis_hub.workflow.resources import Execution
    from lewis_hub.workflow.single_model import (
        diff_merges,
        evaluate_model,
        extract_lora,
        measure_model,
        read_profile,
    )


__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Evaluation",
    "Execution",
    "Gate",
    "Guide",
    "LewisHubError",
    "ModelEntry",
    "ModelReference",
    "Publishing",
    "Recipe",
    "Search",
    "calibrate",
    "check",
    "compare_profiles",
    "diff_merges",
    "evaluate_model",
    "extract_lora",
    "measure_model",
    "merge_models",
    "open_target",
    "publish",
    "read_profile",
    "read_recipe",
    "stream",
    "tune_recipe",
    "verify",
    "zoo_folder",
]

_HOME = {
    "demo.zoo": ("zoo_folder",),
    "errors": ("LewisHubError",),
    "pipeline": (
        *("calibrate", "check", "merge_models", "open_target"),
        *("publish", "stream", "verify"),
    ),
    "recipe.schema": (
        *("Calibration", "Evaluation", "Gate", "Guide"),
        *("ModelEntry", "ModelReference", "Publishing", "Recipe"),
    ),
    "report.profiles": ("compare_profiles",),
    "tune.objective": ("Search",),
    "tune.run": ("tune_recipe",),
    "workflow.resolve": ("read_recipe",),
    "workflow.resources": ("Execution",),
    "workflow.single_model": (
        *("diff_merges", "evaluate_model", "extract_lora"),
        *("measure_model", "read_profile"),
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
