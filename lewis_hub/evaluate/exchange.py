"""The weights of a model that is in memory give way to those of another of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor


def exchange(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make of a loaded model what would have been loaded from a folder with these tensors.

    transformers' own rules say what becomes of them: tensors of a file may be put together, split
    or renamed in memory. Tokenizer and configuration stay.

    Args:
        model: of what `load` returns.
        tensors: all of the other model, by the names that a file has for them.

    Raises:
        EvaluationError: a weight of the model is not among them, or has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    loading = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        device_map={"": model.device},
        weight_mapping=cast("Any", get_model_conversion_mapping(model)),
    )
    with quiet_libraries():
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), loading)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    parameters = {name for name, _ in model.named_parameters()}
    absent = parameters & {*found.missing_keys, *(key for key, *_ in found.mismatched_keys)}
    if absent:
        problem = f"{len(absent)} of its weights cannot be exchanged, {min(absent)} among them."
        raise EvaluationError("the model", problem, "Expected: a merge with the same tensors.")
