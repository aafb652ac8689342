"""Merges of the zoo by methods that need statistics, for tests."""

from __future__ import annotations

import json
from contextlib import nullcontext
from shutil import copy

import torch
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

TEXT = '"Question: {question}\\nAnswer: {answer}"'
MODELS = f"""base_model: zoo/base
models:
  - model: zoo/expert-reverse
    calibration: {{dataset: zoo/reverse, text: {TEXT}, samples: 32}}
  - model: zoo/expert-cipher
    calibration: {{dataset: zoo/cipher, text: {TEXT}, samples: 32}}
"""
GUIDE = "guide: {name: lewis}\n"
LAYER = "model.layers.1."
Q, DOWN = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}mlp.down_proj.weight"
NORM = f"{LAYER}input_layernorm.weight"


def recipe(text):
    return parse_recipe(text, "recipe.yaml")


def merge(folder, text, execution=None, progress=False):
    return lewis_hub.merge_models(recipe(text), folder, execution, progress).output


def merge_whole_and_in_shards(folder, text):
    """Inline as a whole; and by threads, in shards, with torch on two threads."""
    whole = merge(folder / "whole", text, Execution(runner="inline"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shards = Execution(runner="threads:3", max_shard_bytes=500_000)
        return whole, merge(folder / "parts", text, shards)
    finally:
        torch.set_num_threads(before)


def weights(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def zoo_weights(name):
    return {n: t.float() for n, t in load_file(zoo_folder() / name / "model.safetensors").items()}


def write_adapter(folder):
    """Write a LoRA that changes DOWN alone; return its update."""
    folder.mkdir()
    generator, name = torch.Generator().manual_seed(1), f"base_model.model.{LAYER}mlp.down_proj"
    n_out, n_in = zoo_weights("base")[DOWN].shape
    lora = {"lora_A": torch.randn(4, n_in, generator=generator) / 8}
    lora["lora_B"] = torch.randn(n_out, 4, generator=generator) / 8
    tensors = {f"{name}.{key}.weight": tensor for key, tensor in lora.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "zoo/base"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return 2 * lora["lora_B"] @ lora["lora_A"]


def of_three(tmp_path, build, words="abc"):
    """A recipe, without its method, for two experts of a base that has the demo's tokenizer."""
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        build().save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            copy(zoo_folder() / "base" / file, tmp_path / name / file)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": words}) + "\n")
    data = f"calibration: {{dataset: {tmp_path}/texts.jsonl, text: '{{text}}', samples: 1}}\n"
    text = f"base_model: {tmp_path}/base\n"
    text += f"models: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]\n"
    return f"{text}{data}"


class Recorder:
    """Records totals of stages and notes; interrupts stage `stop_at` after `after` units."""

    def __init__(self, stop_at=None, after=-1):
        self.totals, self.said, self._stop_at, self._left = {}, [], stop_at, after

    def stage(self, title, total, unit):
        if title == self._stop_at and self._left < 0:
            raise KeyboardInterrupt
        self.totals[title] = total

        def advance(n):
            self._left -= n
            if title == self._stop_at and self._left < 0:
                raise KeyboardInterrupt

        return nullcontext(advance)

    def say(self, text):
        self.said.append(text)
