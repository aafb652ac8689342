"""Models in folders and on the embedded Hub, for tests of whole merges."""

import json
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from lewis_hub.localhub.store import git_file
from lewis_hub.recipe.read import parse_recipe

RECIPE = """base_model: BASE
models:
  - model: EXPERT
    parameters: {weight: 1.0}
merge_method: ties
"""
DENSITY = "parameters: {density: 0.4}\n"


def recipe(base="zoo/base", expert="zoo/expert-reverse", more=DENSITY):
    text = RECIPE.replace("BASE", str(base)).replace("EXPERT", str(expert))
    return parse_recipe(text + more, "recipe.yaml")


def push_folder(api, folder, repo):
    """Create a repo with the files of a folder; return its name."""
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def weight_bytes(folder):
    """The bytes of each file of weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def altering(weights):
    """Functions that write other values into a file of weights, and its old content again."""
    kept = weights.read_bytes()

    def change():
        save_file({name: 1.5 * one for name, one in load(kept).items()}, weights, {"format": "pt"})

    def restore():
        weights.write_bytes(kept)

    return change, restore


def push_by_another(hub, repo):
    """Commit as another user; not over HTTP, because the server is answering a request."""
    found = hub.store.find("models", repo)
    head = found.resolve("main")
    files = {**head.files, "theirs": git_file(b"x", hub.store.blobs.add(b"x"))}
    theirs = replace(head, parent=head.sha, title="Theirs", files=files)
    hub.store.add_commit(found, theirs, "refs/heads/main")


@contextmanager
def watch_requests(hub, hear):
    """Call `hear` with the method and the target of each request before it is answered."""
    strike = hub.faults.take

    def take(method, target):
        hear(method, target)
        return strike(method, target)

    hub.faults.take = take
    try:
        yield
    finally:
        hub.faults.take = strike


def folder_bytes(*folders):
    """The size of all files but JSON in folders; files that are deleted meanwhile count 0."""
    total = 0
    for place, _, names in (walked for folder in folders for walked in os.walk(folder)):
        for name in (name for name in names if not name.endswith(".json")):
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def tiny(folder, seed):
    """A Llama of one block, without a tokenizer."""
    shapes = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}
    block = "model.layers.0."
    for name in "qkvo":
        shapes[f"{block}self_attn.{name}_proj.weight"] = (16, 16)
    for name, shape in {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}.items():
        shapes[f"{block}mlp.{name}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64}
    config |= {"hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder
