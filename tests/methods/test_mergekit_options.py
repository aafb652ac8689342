"""Every option of mergekit 0.1.5's configurations is understood, or refused by its name.

The tables are what mergekit's classes say (`ParameterSpec`, `MergeConfiguration` and its parts); a
slow test holds them against mergekit itself.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lewis_hub.errors import LewisHubError
from lewis_hub.merge.settings import require_valid
from lewis_hub.methods import registry
from lewis_hub.recipe.read import parse_recipe

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")

MIXED = {"weight": 0.5, "density": 0.5}
SHARED = {"int8_mask": True, "normalize": True, "rescale": True, "lambda": 0.7}
OPTIONS = {  # method -> what a model may have of its own, and what all have together
    "linear": ({"weight": 0.5}, {"normalize": False}),
    "slerp": ({}, {"t": 0.3}),
    "nuslerp": ({"weight": 0.5}, {"nuslerp_row_wise": True, "nuslerp_flatten": False}),
    "multislerp": ({"weight": 0.5}, {"normalize_weights": False, "eps": 1e-6}),
    "karcher": ({}, {"max_iter": 5, "tol": 1e-4}),
    "model_stock": ({}, {"filter_wise": True}),
    "arcee_fusion": ({}, {}),
    "nearswap": ({}, {"t": 0.3}),
    "passthrough": ({"scale": 0.5}, {}),
    "sce": ({}, {"int8_mask": True, "select_topk": 0.5}),
    "task_arithmetic": (MIXED, SHARED),
    "ties": (MIXED, SHARED),
    "dare_linear": (MIXED, SHARED),
    "dare_ties": (MIXED, SHARED),
    "breadcrumbs": (MIXED | {"gamma": 0.1}, SHARED),
    "breadcrumbs_ties": (MIXED | {"gamma": 0.1}, SHARED),
    "della": (MIXED | {"epsilon": 0.1}, SHARED),
    "della_linear": (MIXED | {"epsilon": 0.1}, SHARED),
    "ram": ({}, {"epsilon": 1e-4}),
    "ramplus_tl": ({}, {"epsilon": 1e-4, "r": 0.2, "alpha": 0.1}),
}
WITHOUT_EFFECT = {("task_arithmetic", "density")}  # neither in mergekit


def cases():
    for method, (own, shared) in OPTIONS.items():
        for option, value in own.items():
            yield method, option, value, True
        for option, value in shared.items():
            yield method, option, value, False


@pytest.mark.parametrize(("method", "option", "value", "own"), list(cases()))
def test_an_option_is_understood(method, option, value, own):
    found = registry.find(method)
    needed = {name: 0.5 for name, default in found.options.items() if default is None}
    mine, common = ({option: value}, needed) if own else ({}, needed | {option: value})

    require_valid(found, common, [mine])
    assert found.uses(option, per_source=own) is ((method, option) not in WITHOUT_EFFECT)
    if own:
        require_valid(found, needed | {option: value}, [])


MODELS = "models: [{model: a/c, parameters: {weight: 0.5}}]\n"
SLICE = (
    "slices:\n- sources: [{model: a/b, layer_range: [0, 2]}, {model: a/c, layer_range: [0, 2]}]\n"
)
TOKENS = "tokenizer: {source: union, tokens: {<x>: {source: SOURCE, force: true}}}\n"
READ = {  # field -> ways to write it
    "models": [MODELS],
    "slices": [SLICE],
    "merge_method": [MODELS],
    "base_model": [MODELS],
    "parameters": [
        f"{MODELS}parameters: {{weight: {value}}}\n"
        for value in (
            "1",
            "1e-3",
            "[0.1, 0.9]",
            "{value: 0.5}",
            "{filter: mlp, value: [0.1, 0.2]}",
            "[{filter: mlp, value: 0.1}, {filter: '*', value: 0.3}]",
        )
    ]
    + [f"{MODELS}parameters: null\n"],
    "dtype": [
        f"{MODELS}dtype: {name}\n" for name in ("bfloat16", "torch.float16", "float32", "float64")
    ],
    "out_dtype": [f"{MODELS}out_dtype: bfloat16\n"],
    "tokenizer_source": [f"{MODELS}tokenizer_source: {one}\n" for one in ("base", "union", "a/c")],
    "tokenizer": [f"{MODELS}tokenizer: {{source: base, pad_to_multiple_of: 64}}\n"],
    "chat_template": [f"{MODELS}chat_template: {one}\n" for one in ("auto", "chatml", "llama3")],
    "models.model": [
        "models: [{model: a/c@main}]\n",
        "models: [{model: a/b+a/lora@v1}]\n",
        "models: [{model: {model: {path: a/c, revision: main}}}]\n",
        "models: [{model: {model: {path: a/b}, lora: {path: a/lora, revision: v1}}}]\n",
    ],
    "models.parameters": ["models: [{model: a/c, parameters: null}]\n"],
    "slices.sources.model": [SLICE],
    "slices.sources.layer_range": [SLICE],
    "slices.sources.parameters": [SLICE.replace("[0, 2]}]", "[0, 2], parameters: {weight: 1}}]")],
    "slices.sources": [SLICE],
    "slices.base_model": [SLICE + "  base_model: a/c\n"],
    "slices.parameters": [SLICE + "  parameters: {weight: 0.5}\n"],
    "tokenizer.source": [f"{MODELS}tokenizer: {{source: a/c}}\n"],
    "tokenizer.tokens": [
        MODELS + TOKENS.replace("SOURCE", source)
        for source in (
            "a/c",
            "{kind: zero}",
            "{kind: model_token, model: a/c, token: y}",
            "{kind: model_token, model: a/c, token_id: 3}",
        )
    ],
    "tokenizer.pad_to_multiple_of": [f"{MODELS}tokenizer: {{pad_to_multiple_of: 8}}\n"],
}
WEIGHED = {"model": "a/c", "parameters": {"weight": 0.5}, "calibration": None, "align": None}
FIRST, SECOND = ({"model": m, "layer_range": (0, 2), "parameters": {}} for m in ("a/b", "a/c"))
ONE_TOKEN = {"kind": "model_token", "model": "a/c", "token": None, "token_id": None}
MEANT = {  # field -> what each of these ways means; of several models, slices, sources the last
    "models": [WEIGHED],
    "slices": [{"sources": (FIRST, SECOND), "base_model": None, "parameters": {}}],
    "merge_method": ["ties"],
    "base_model": ["a/b"],
    "parameters": [
        {"weight": 1},
        {"weight": 0.001},
        {"weight": (0.1, 0.9)},
        {"weight": ({"filter": None, "value": 0.5},)},
        {"weight": ({"filter": "mlp", "value": (0.1, 0.2)},)},
        {"weight": ({"filter": "mlp", "value": 0.1}, {"filter": "*", "value": 0.3})},
        {},
    ],
    "dtype": ["bfloat16", "float16", "float32", "float64"],
    "out_dtype": ["bfloat16"],
    "tokenizer_source": ["base", "union", "a/c"],
    "tokenizer": [{"source": "base", "tokens": {}, "pad_to_multiple_of": 64}],
    "chat_template": ["auto", "chatml", "llama3"],
    "models.model": ["a/c@main", "a/b+a/lora@v1"] * 2,
    "models.parameters": [{}],
    "slices.sources.model": ["a/c"],
    "slices.sources.layer_range": [(0, 2)],
    "slices.sources.parameters": [{"weight": 1}],
    "slices.sources": [SECOND],
    "slices.base_model": ["a/c"],
    "slices.parameters": [{"weight": 0.5}],
    "tokenizer.source": ["a/c"],
    "tokenizer.tokens": [
        {"<x>": {"source": source, "force": True}}
        for source in (
            "a/c",
            {"kind": "zero"},
            ONE_TOKEN | {"token": "y"},
            ONE_TOKEN | {"token_id": 3},
        )
    ],
    "tokenizer.pad_to_multiple_of": [8],
}
TURNED_DOWN = {  # field -> how it is written, and the name that the message has
    "modules": ("modules: {text: {models: [{model: a/c}]}}\n", "`modules`"),
    "slices.residual_weight": (SLICE + "  residual_weight: 0.5\n", "`slices[0].residual_weight`"),
    "models.model.override_architecture": (
        "models: [{model: {model: {path: a/c}, override_architecture: X}}]\n",
        "`override_architecture`",
    ),
}


def last_at(document, field):
    for part in field.split("."):
        document = document[part]
        if isinstance(document, tuple) and part in ("models", "slices", "sources"):
            document = document[-1]
    return document


@pytest.mark.parametrize("field", READ)
def test_a_field_is_read_as_it_is_meant(field):
    recipes = [
        parse_recipe(f"base_model: a/b\nmerge_method: ties\n{text}", "config.yaml")
        for text in READ[field]
    ]

    assert [last_at(recipe.model_dump(), field) for recipe in recipes] == MEANT[field]
    assert all(len(recipe.experts) == 1 for recipe in recipes)


@pytest.mark.parametrize("field", TURNED_DOWN)
def test_a_field_that_is_not_understood_is_refused_by_name(field):
    text, named = TURNED_DOWN[field]

    with pytest.raises(LewisHubError) as caught:
        parse_recipe(f"base_model: a/b\nmerge_method: ties\n{text}", "config.yaml")

    assert named in str(caught.value)


ASK = """
import json
from mergekit import config
from mergekit.common import ModelReference
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope
from mergekit.tokenizer.config import TokenizerConfig
methods = {
    m.spec.name: [[p.name, p.scope != ParameterScope.SHARED] for p in m.spec.parameters]
    for m in registry.registered_methods()
}
parts = {
    "": config.MergeConfiguration,
    "models.": config.InputModelDefinition,
    "models.model.": ModelReference,
    "slices.": config.OutputSliceDefinition,
    "slices.sources.": config.InputSliceDefinition,
    "tokenizer.": TokenizerConfig,
}
fields = [where + name for where, part in parts.items() for name in part.model_fields]
print(json.dumps([methods, fields]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here")
def test_the_tables_hold_all_that_mergekit_has():
    python = Path(MERGEKIT).parent / "python"
    told = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout
    methods, fields = json.loads(told.splitlines()[-1])

    assert methods.keys() == OPTIONS.keys()
    named = {name for parameters in methods.values() for name, _ in parameters}
    assert {"embed_slerp", *named} == registry.MERGEKIT
    for method, (own, shared) in OPTIONS.items():
        wanted = {(name, True) for name in own} | {(name, False) for name in shared}
        assert {tuple(one) for one in methods[method]} == wanted, method
    inside = {"models.model.model", "models.model.lora"}  # written in `models.model`
    assert set(fields) == READ.keys() | TURNED_DOWN.keys() | inside
