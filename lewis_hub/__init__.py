"""Merge language models by layer-wise sparsity, score the result and publish it.

Every public name is here; its module is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lewis_hub.demo.zoo import zoo_folder as zoo_folder
    from lewis_hub.errors import LewisHubError as LewisHubError
    from lewis_hub.merge.adapter_settings import LoraSettings as LoraSettings
    from lewis_hub.merge.transplant import TransplantSettings as TransplantSettings
    from lewis_hub.pipeline import calibrate as calibrate
    from lewis_hub.pipeline import check as check
    from lewis_hub.pipeline import merge_models as merge_models
    from lewis_hub.pipeline import open_target as open_target
    from lewis_hub.pipeline import publish as publish
    from lewis_hub.pipeline import stream as stream
    from lewis_hub.rebuild import verify as verify
    from lewis_hub.recipe.evaluation import Evaluation as Evaluation
    from lewis_hub.recipe.evaluation import Gate as Gate
    from lewis_hub.recipe.reference import ModelReference as ModelReference
    from lewis_hub.recipe.schema import Calibration as Calibration
    from lewis_hub.recipe.schema import Guide as Guide
    from lewis_hub.recipe.schema import ModelEntry as ModelEntry
    from lewis_hub.recipe.schema import Publishing as Publishing
    from lewis_hub.recipe.schema import Recipe as Recipe
    from lewis_hub.report.profiles import compare_profiles as compare_profiles
    from lewis_hub.tune.objective import Search as Search
    from lewis_hub.tune.run import tune_recipe as tune_recipe
    from lewis_hub.workflow.adapters import merge_loras as merge_loras
    from lewis_hub.workflow.draft import Draft as Draft
    from lewis_hub.workflow.draft import Outline as Outline
    from lewis_hub.workflow.draft import draft_recipe as draft_recipe
    from lewis_hub.workflow.finished import export_model as export_model
    from lewis_hub.workflow.resolve import read_recipe as read_recipe
    from lewis_hub.workflow.resources import Execution as Execution
    from lewis_hub.workflow.single_model import diff_merges as diff_merges
    from lewis_hub.workflow.single_model import evaluate_model as evaluate_model
    from lewis_hub.workflow.single_model import extract_lora as extract_lora
    from lewis_hub.workflow.single_model import measure_model as measure_model
    from lewis_hub.workflow.single_model import read_profile as read_profile
    from lewis_hub.workflow.transplant import transplant_tokenizer as transplant_tokenizer


__version__ = "0.1.0"
_HOME = {  # module -> its public names
    "demo.zoo": ("zoo_folder",),
    "errors": ("LewisHubError",),
    "merge.adapter_settings": ("LoraSettings",),
    "merge.transplant": ("TransplantSettings",),
    "pipeline": (
        *("calibrate", "check", "merge_models", "open_target"),
        *("publish", "stream"),
    ),
    "rebuild": ("verify",),
    "recipe.evaluation": ("Evaluation", "Gate"),
    "recipe.reference": ("ModelReference",),
    "recipe.schema": ("Calibration", "Guide", "ModelEntry", "Publishing", "Recipe"),
    "report.profiles": ("compare_profiles",),
    "tune.objective": ("Search",),
    "tune.run": ("tune_recipe",),
    "workflow.adapters": ("merge_loras",),
    "workflow.draft": ("Draft", "Outline", "draft_recipe"),
    "workflow.finished": ("export_model",),
    "workflow.resolve": ("read_recipe",),
    "workflow.resources": ("Execution",),
    "workflow.single_model": (
        *("diff_merges", "evaluate_model", "extract_lora"),
        *("measure_model", "read_profile"),
    ),
    "workflow.transplant": ("transplant_tokenizer",),
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
