"""Streams of recipes that measure: no model is on the disk, and the bytes are the local ones."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from served import bytes_in, pushed
from streamed import (
    SHARD_BYTES,
    SMALL,
    apart_from_costs,
    on_disk,
    published,
    read,
    seed,
    stream,
)

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import RecipeError
from lewis_hub.recipe_file import parse_recipe

TEXT = '"Question: {question}\\nAnswer: {answer}"'
RECIPE = f"""base_model: tests/base
models:
  - model: tests/reverse
    calibration: {{dataset: zoo/reverse, text: {TEXT}, samples: 4}}
  - model: zoo/expert-cipher
    calibration: {{dataset: zoo/cipher, text: {TEXT}, samples: 4}}
publish: {{repo: tests/streamed}}
"""
WAYS = {
    "lewis": "merge_method: ties\nguide: {name: lewis}\n",
    "magnitude": "merge_method: ties\nguide: {name: magnitude}\n",
    "regmean": "merge_method: regmean\n",
    "trim": "merge_method: ties\nparameters: {density: 0.3, trim: activation}\n",
}


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return seed(hub, tmp_path)


def recipe(way, text=RECIPE):
    return parse_recipe(text + WAYS[way], "recipe.yaml")


@pytest.mark.parametrize(
    "way", ["lewis", "regmean", *(pytest.param(w, marks=pytest.mark.slow) for w in ("magnitude", "trim"))]
)
def test_what_is_measured_on_the_way_gives_the_bytes_of_a_local_merge(api, hub, tmp_path, way):
    stream(recipe(way), tmp_path / "work")

    lewis_hub.merge_models(recipe(way), tmp_path / "merged", SMALL)
    merged = on_disk(tmp_path / "merged")
    assert published(hub).keys() == merged.keys()
    assert apart_from_costs(published(hub)) == apart_from_costs(merged)
    assert ("lewis/importance.json" in merged) == (way in {"lewis", "magnitude"})
