"""Merge language models by layer-wise sparsity, score the result and publish it.

Everything public is here; each name is imported when it is first used.
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
        evaluate_model,
        merge_models,
        open_target,
        publish,
        stream,
        verify,
    )
    from lewis_hub.recipe.schema import Evaluation, ModelReference, Publishing, Recipe
    from lewis_hub.workflow.execution import Execution
    from lewis_hub.workflow.read import read_recipe


__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "Execution",
    "LewisHubError",
    "ModelReference",
    "Publishing",
    "Recipe",
    "calibrate",
    "check",
    "evaluate_model",
    "merge_models",
    "open_target",
    "publish",
    "read_recipe",
    "stream",
    "verify",
    "zoo_folder",
]

_HOME = {
    "Evaluation": "recipe.schema",
    "Execution": "workflow.execution",
    "LewisHubError": "errors",
    "ModelReference": "recipe.schema",
    "Publishing": "recipe.schema",
    "Recipe": "recipe.schema",
    "calibrate": "pipeline",
    "check": "pipeline",
    "evaluate_model": "pipeline",
    "merge_models": "pipeline",
    "open_target": "pipeline",
    "publish": "pipeline",
    "read_recipe": "workflow.read",
    "stream": "pipeline",
    "verify": "pipeline",
    "zoo_folder": "demo.zoo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
