"""Quantised models of the zoo, and the float32 models that they stand for, for tests of merges."""

import json
import shutil

from hub_models import push_folder, recipe, weight_bytes
from safetensors.torch import load_file, save_file

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder


def configure(folder, **more):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))


def quantise_beside_float32(folder, source, quantise, configured):
    """Write a model of the zoo with quantised projections, and beside it the same in float32.

    `quantise` takes a tensor's name and value; it returns the stored tensors by name, and the value
    in float32 that they encode.
    """
    twin = folder.with_name(folder.name + "-float32")
    for copy in (folder, twin):
        shutil.copytree(zoo_folder() / source, copy)
    stored, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts, plain[name] = {name: weight}, weight
        if name.endswith("_proj.weight"):
            parts, plain[name] = quantise(name, weight)
        stored |= parts
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config=configured)
    return folder, twin


def assert_merges_as_float32(api, few, twin, folder, base="zoo/base"):
    """Merge from a folder and from the Hub, and compare with the float32 model."""
    push_folder(api, few, "zoo/few")

    for name, expert in {"few": few, "hub": "zoo/few", "twin": twin}.items():
        pipeline.merge_models(recipe(base, expert), folder / name)

    found = weight_bytes(folder / "few")
    assert found == weight_bytes(folder / "hub") == weight_bytes(folder / "twin")
