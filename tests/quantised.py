"""Quantised models of the zoo, and the float32 models that they stand for, for tests of merges."""

import json
import shutil

from safetensors.torch import load_file, save_file
from served import pushed, recipe, weights

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder


def configure(folder, **more):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))


def beside_twin(folder, source, quantise, configured):
    """A model of the zoo whose projections are quantised, and beside it what it stands for.

    `quantise` takes a tensor's name and value; it gives what is stored for it, by name, and what
    that stands for in float32.
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


def assert_merges_as_its_twin(api, few, twin, folder, base="zoo/base"):
    """From its folder and from the Hub."""
    pushed(api, few, "zoo/few")

    for name, expert in {"few": few, "hub": "zoo/few", "twin": twin}.items():
        pipeline.merge_models(recipe(base, expert), folder / name)

    found = weights(folder / "few")
    assert found == weights(folder / "hub") == weights(folder / "twin")
