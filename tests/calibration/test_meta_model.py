"""What `meta_model` uses of transformers that is not public, with the signatures it needs."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from lewis_hub.calibration import meta_model as module
from lewis_hub.calibration.meta_model import as_stored, weight_names

from .conftest import tiny_model


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            core_model_loading.convert_and_load_state_dict_in_model,
            ["model", "state_dict", "load_config"],
        ),
        (
            core_model_loading.rename_source_key,
            [
                "source_key",
                "weight_renamings",
                "weight_converters",
                "base_model_prefix",
                "meta_state_dict",
            ],
        ),
        (core_model_loading.revert_weight_conversion, ["model", "state_dict"]),
        (core_model_loading.dot_natural_key, ["s"]),
        (get_model_conversion_mapping, ["model"]),
        (no_init_weights, []),
        (PreTrainedModel._get_dtype_plan, ["self", "dtype"]),
    ],
)
def test_functions_of_transformers_take_what_they_are_called_with(function, parameters):
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_the_loading_of_transformers_has_the_fields_that_are_set():
    needed = {"dtype", "dtype_plan", "device_map", "weight_mapping"}

    assert needed <= {field.name for field in fields(LoadStateDictConfig)}
    assert hasattr(PreTrainedModel, "_from_config")


def test_a_model_is_stored_as_as_stored_says(saved):
    model = tiny_model("gpt_neox")
    stored = load_file(saved(model) / "model.safetensors")

    names = weight_names(model)

    assert names.keys() == dict(model.named_parameters()).keys()
    assert set(names.values()) <= stored.keys()
    assert as_stored(model, dict(model.named_parameters())).keys() == set(names.values())


def test_no_other_file_of_the_package_uses_what_transformers_has_inside():
    inside = ("core_model_loading", "_get_dtype_plan", "conversion_mapping", "_from_config")
    files = Path(module.__file__).parent.glob("*.py")
    using = [
        file.name
        for file in files
        if any(word in file.read_text(encoding="utf-8") for word in inside)
    ]
    assert using == ["meta_model.py"]
