"""Merges from Hub to Hub, and what they leave there, for tests that look at them."""

import json
import shutil

from safetensors.torch import load_file, save_file
from served import pushed

import lewis_hub
from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.files import sha256_of
from lewis_hub.stages.execution import Execution

REPO = "tests/streamed"
SHARD_BYTES = 700_000
SMALL = Execution(runner="threads:2", max_shard_bytes=SHARD_BYTES)


def seed(hub, folder):
    """The zoo, two of its models in three shards each; returns a client."""
    api = hub.api()
    seed_hub(api)
    for name, repo in (("base", "base"), ("expert-reverse", "reverse")):
        pushed(api, in_shards(zoo_folder() / name, folder / repo), f"tests/{repo}")
    return api


def in_shards(model, folder):
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(model / "model.safetensors")
    located = {}
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        part = {key: tensor for j, (key, tensor) in enumerate(tensors.items()) if j % 3 == i}
        save_file(part, folder / name, {"format": "pt"})
        located |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": located}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stream(recipe, output, execution=SMALL, progress=None):
    target = lewis_hub.open_target(recipe.publish)
    return lewis_hub.stream(recipe, target, output, execution, progress)


def published(hub, repo=REPO):
    """Path -> the sha256 of its bytes, of what main holds; read from the store, not over HTTP."""
    found = hub.store.find("models", *repo.split("/"))
    if found is None:
        return {}
    files = hub.store.resolve(found, "main").files
    return {path: file.sha256 for path, file in files.items() if path != ".gitattributes"}


def read(hub, path, repo=REPO):
    """The bytes of one file on main."""
    return hub.store.blobs.read(published(hub, repo)[path])


def on_disk(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def apart_from_costs(found):
    """What equal merges have in common: the rest tells when a run was, and what it took."""
    told = {"README.md", "lewis/report.html", "lewis/cost.json", "lewis/provenance.json"}
    return {path: sha256 for path, sha256 in found.items() if path not in told}
