from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.recipe.schema import Conditional
from lewis_hub.report.mergekit import MergekitMerge, conditions, mergekit_config


def as_mergekit_reads(setting: Any, tensor: str) -> Any:
    """mergekit's rule for a setting, written from its documentation."""
    if not isinstance(setting, list):
        return setting
    for condition in setting:
        pattern = condition.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return condition["value"]
    return None


TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.11.self_attn.q_proj.weight",
    "model.norm.weight",
)
MATH = ExpertSchedule("zoo/math@" + "a" * 40, 0.9, {TENSORS[1]: 0.3, TENSORS[3]: 0.8})
TEXT = ExpertSchedule("./text", 1.0, {TENSORS[1]: 1 / 3, TENSORS[3]: 0.5})


def merge(**changes: Any) -> MergekitMerge:
    told: dict[str, Any] = {
        "method": "ties",
        "base": "zoo/base@" + "b" * 40,
        "models": {MATH.source: {"weight": 1.0}, TEXT.source: {"weight": (0.0, 0.5)}},
        "parameters": {"normalize": True, "lambda": 0.8},
        "dtype": "bfloat16",
        "schedule": DensitySchedule((MATH, TEXT)),
        "tensors": TENSORS,
    }
    return MergekitMerge(**(told | changes))


def test_a_guided_merge_gives_each_tensor_its_density():
    document = yaml.safe_load(mergekit_config(merge()))

    assert document["merge_method"] == "ties"
    assert document["base_model"] == "zoo/base@" + "b" * 40
    assert document["tokenizer_source"] == "base"
    assert document["parameters"] == {"normalize": True, "lambda": 0.8}
    assert (document["dtype"], document["out_dtype"]) == ("float32", "bfloat16")
    first, second = document["models"]
    assert (first["model"], first["parameters"]["weight"]) == (MATH.source, 1.0)
    assert (second["model"], second["parameters"]["weight"]) == ("./text", [0.0, 0.5])
    for model, expert in ((first, MATH), (second, TEXT)):
        density = model["parameters"]["density"]
        assert [as_mergekit_reads(density, name) for name in TENSORS] == [
            expert.density(name) for name in TENSORS
        ]


def test_it_is_written_one_tensor_a_line():
    lines = mergekit_config(merge()).splitlines()

    assert lines[0].startswith("# The same merge for mergekit")
    assert f"    - {{filter: {TENSORS[1]}, value: 0.3}}" in lines
    assert "    - {value: 0.9}" in lines


def test_an_unguided_merge_keeps_its_own_settings():
    by_filter = (Conditional(filter="mlp", value=0.5), Conditional(value=(0.1, 1.0)))
    unguided = merge(
        method="dare_ties",
        schedule=None,
        dtype=None,
        models={"a/b": {"weight": 0.5, "density": by_filter}, "c/d": {}},
    )

    document = yaml.safe_load(mergekit_config(unguided))

    assert document["models"] == [
        {
            "model": "a/b",
            "parameters": {
                "weight": 0.5,
                "density": [{"filter": "mlp", "value": 0.5}, {"value": [0.1, 1.0]}],
            },
        },
        {"model": "c/d"},
    ]
    assert "dtype" not in document
    assert "out_dtype" not in document


def test_a_method_without_a_base_names_none():
    document = yaml.safe_load(mergekit_config(merge(method="linear", base=None, schedule=None)))

    assert "base_model" not in document
    assert "tokenizer_source" not in document


@pytest.mark.parametrize("method", ["karcher", "linear"])
def test_a_base_that_is_not_merged_is_not_named(method):
    """mergekit would merge it as one more model."""
    beside = yaml.safe_load(mergekit_config(merge(method=method, schedule=None)))
    listed = merge(method=method, schedule=None)
    listed = replace(listed, models={listed.base: {}} | dict(listed.models))

    assert "base_model" not in beside
    assert yaml.safe_load(mergekit_config(listed))["base_model"] == listed.base


PARTS = st.lists(st.sampled_from(["a", "1", "11", "b.a", ".weight"]), min_size=1, max_size=4)
NAMES = st.lists(PARTS.map(".".join), unique=True, max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, st.data())
def test_every_tensor_gets_its_own_density_however_names_contain_each_other(names, data):
    scheduled = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    expert = ExpertSchedule("e", 1.0, {name: (i + 1) / 100 for i, name in enumerate(scheduled)})

    listed = [dict(row) for row in conditions(expert, names)]

    assert [as_mergekit_reads(listed, name) for name in names] == [
        expert.density(name) for name in names
    ]


def test_hostile_names_stay_values():
    hostile = merge(models={"x: [\n#": {"weight": 1.0}}, schedule=None)

    assert yaml.safe_load(mergekit_config(hostile))["models"][0]["model"] == "x: [\n#"


@pytest.mark.parametrize("name", ["base", "union"])
def test_a_text_setting_stays_text(name):
    document = yaml.safe_load(mergekit_config(merge(parameters={"mode": name})))

    assert document["parameters"] == {"mode": name}


def test_a_guides_weights_multiply_those_of_each_model_tensor_by_tensor():
    math = replace(MATH, weights={TENSORS[1]: 0.5})
    text = ExpertSchedule("./text", 1.0, {}, {TENSORS[1]: 3.0, TENSORS[3]: 4.0})

    document = yaml.safe_load(mergekit_config(merge(schedule=DensitySchedule((math, text)))))

    first, second = (model["parameters"] for model in document["models"])
    assert [as_mergekit_reads(first["weight"], name) for name in TENSORS] == [1, 0.5, 1, 1, 1]
    assert [as_mergekit_reads(first["density"], name) for name in TENSORS] == [
        MATH.density(name) for name in TENSORS
    ]
    # a gradient from 0 to .5 over 12 blocks
    assert [as_mergekit_reads(second["weight"], name) for name in TENSORS] == pytest.approx(
        [0, 3 * 0.5 / 11, 0.5 / 11, 4 * 0.5, 0.5]
    )
    assert "density" not in second
