"""Permuting the units of a model changes no output: exactness by architecture."""

import numpy as np
import pytest
import torch
import transformers

from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_tensor
from lewis_hub.merge.permutation import PermutingReader
from lewis_hub.merge.symmetries import permute, units_of
from tests.unit_orders import random_orders

COMMON = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": transformers.LlamaConfig(**COMMON, **GROUPED, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**COMMON, **GROUPED, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, **GROUPED, head_dim=8),
    "mistral": transformers.MistralConfig(**COMMON, **GROUPED),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_layer=2, n_embd=24, n_head=4, n_positions=64),
}


def saved(config, folder, seed=0):
    """A model of random weights, biases and norms too, in a folder."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_permuted_units_leave_the_logits_as_they_were(kind, tmp_path):
    model = saved(MODELS[kind], tmp_path)
    checkpoint = local_checkpoint("it", tmp_path)
    units = units_of(checkpoint, model.config.to_dict())
    orders = random_orders(units, np.random.default_rng(1))
    ids = torch.arange(40).reshape(2, 20) % 97
    before = model(ids).logits

    permuted = permute(checkpoint, units, orders)
    with TensorReader(tmp_path, "it") as files:
        reader = PermutingReader(files)
        tensors = {name: read_tensor(reader, one) for name, one in permuted.tensors.items()}
    own = model.state_dict()
    changed = [name for name, tensor in tensors.items() if not tensor.equal(own[name])]
    model.load_state_dict(tensors, strict=False)

    assert len(changed) >= len(tensors) - 4  # all but norms of single heads
    assert (model(ids).logits - before).abs().max() < 1e-5
