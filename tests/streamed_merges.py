"""Merges that are streamed from Hub to Hub, and the files that they publish, for tests."""

import json
import shutil
from contextlib import contextmanager

import torch
from hub_models import folder_bytes, push_folder, watch_requests
from safetensors.torch import load_file, save_file
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.files import sha256_of
from lewis_hub.workflow.resources import Execution

REPO = "tests/streamed"
MODEL_BYTES = 2 * 1_157_504  # of the tensors of each model of the zoo
SHARD_BYTES = 700_000
MOST_BYTES = 2 * SHARD_BYTES + 3 * 99_840  # a thread may wait for the sources of one more tensor
SMALL = Execution(runner="threads:2", max_shard_bytes=SHARD_BYTES)


def seed(hub, folder):
    """Push the zoo, two of its models in three shards each; return a client."""
    api = hub.api()
    put_zoo(hub)
    for name, repo in (("base", "base"), ("expert-reverse", "reverse")):
        push_folder(api, shard_model(zoo_folder() / name, folder / repo), f"tests/{repo}")
    return api


def shard_model(model, folder):
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


def write_adapter(folder):
    """Write a LoRA with DoRA's magnitudes, for which the base is read twice."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(zoo_folder() / "base" / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (torch.randn(4, n, generator=generator) / 8 for n in reversed(weight.shape))
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.T.contiguous()}
            tensors[f"{key}.lora_magnitude_vector"] = weight.float().norm(dim=1)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def quantise_to_fp8(model, folder):
    """Copy a model with projections in 8-bit floats, one scale for each tensor."""
    shutil.copytree(model, folder)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = weight.float().abs().max().reshape(1) / 448
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stream(recipe, output, execution=SMALL, progress=False):
    target = lewis_hub.open_target(recipe.publish)
    return lewis_hub.stream(recipe, target, output, execution, progress)


def hub_digests(hub, repo=REPO):
    """The sha256 of each file on main, by path; read from the store, not over HTTP."""
    found = hub.store.find("models", repo)
    if found is None:
        return {}
    files = found.resolve("main").files
    return {path: file.sha256 for path, file in files.items() if path != ".gitattributes"}


def read_published(hub, path, repo=REPO):
    """The bytes of one file on main."""
    return hub.store.blobs.path(hub_digests(hub, repo)[path]).read_bytes()


def local_digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def without_costs(found):
    """The files that are equal in equal merges: the others record time and costs."""
    told = {"README.md", "lewis/report.html", "lewis/cost.json", "lewis/provenance.json"}
    return {path: sha256 for path, sha256 in found.items() if path not in told}


def fetched_bytes(hub):
    """Stage -> the bytes of weights that it fetched from the Hub, of the stages that fetch any."""
    stages = json.loads(read_published(hub, "lewis/cost.json"))["stages"]
    return {
        one["stage"]: one["fetched_bytes"] for one in stages if one["fetched_bytes"] is not None
    }


@contextmanager
def record_disk_bytes(hub, work):
    """Record the bytes of shards and ranges on the disk at each request to the Hub."""
    seen = []
    scratch = work.with_name(f"{work.name}.stream.partial") / ".scratch"

    def held():
        ranges = [*scratch.glob("ranges*"), *scratch.glob("fitted/*/*/ranges")]
        return folder_bytes(scratch / "shards", scratch / "written out", *ranges)

    with watch_requests(hub, lambda *_: seen.append(held())):
        yield seen
