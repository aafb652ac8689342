"""Tiny models of sentence-transformers, with pooling and a trained dense layer."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from tiny_models import fine_tuned, tiny_model
from transformers import AutoModel

from lewis_hub.demo.zoo import zoo_folder

KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
ACTIVATION = "torch.nn.modules.activation.Tanh"
SETTINGS = {
    "1_Pooling": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
    "2_Dense": {"in_features": 64, "out_features": 8, "activation_function": ACTIVATION},
}


def embedder(folder, seed, dense=0):
    """A tiny embedding model with a trained dense layer."""
    model = tiny_model("bert", AutoModel)
    (fine_tuned(model, seed) if seed else model).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((zoo_folder() / "base" / name).read_bytes())
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(KINDS.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, settings in SETTINGS.items():
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(dense)
    layer = {"linear.weight": torch.randn(8, 64, generator=generator), "linear.bias": torch.ones(8)}
    save_file(layer, folder / "2_Dense" / "model.safetensors")
    return folder
