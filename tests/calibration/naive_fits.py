"""Fits in sequence by whole models and normal equations, in float64, and models to fit."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Olmo2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from lewis_hub.methods.regmean import RIDGE

from . import conftest

LEVELS = {  # of each block, in the order in which they run; mamba takes dt_proj by its weight
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "mamba": [["mixer.in_proj"], ["mixer.x_proj"], ["mixer.out_proj"]],
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "mamba": "backbone.layers"}
ATTENTION, MLP = "layer.{}.{}Attention.{}", "layer.{}.DenseReluDense.{}"
T5 = {  # as FLAN-T5; cross-attention takes k and v from the encoder's output
    "encoder.block": [
        [ATTENTION.format(0, "Self", name) for name in "qkv"],
        [ATTENTION.format(0, "Self", "o")],
        [MLP.format(1, "wi_0"), MLP.format(1, "wi_1")],
        [MLP.format(1, "wo")],
    ],
    "decoder.block": [
        [ATTENTION.format(0, "Self", name) for name in "qkv"],
        [ATTENTION.format(0, "Self", "o")],
        [ATTENTION.format(1, "EncDec", "q")],
        [ATTENTION.format(1, "EncDec", name) for name in "kv"],
        [ATTENTION.format(1, "EncDec", "o")],
        [MLP.format(2, "wi_0"), MLP.format(2, "wi_1")],
        [MLP.format(2, "wo")],
    ],
}
STACKS = {name: {BLOCKS[name]: levels} for name, levels in LEVELS.items()} | {"t5": T5}
NORMED = {"gemma3": Gemma3TextConfig, "olmo2": Olmo2Config}  # they norm what a block adds
STACKS |= {name: {BLOCKS["llama"]: LEVELS["llama"]} for name in NORMED}
TEXTS = [
    [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24]],
    [[40, 41, 42, 43], [44, 45, 46, 47, 48, 49], [50, 60], [70, 71, 72]],
]


def tiny_t5(seed):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        **small, vocab_size=97, decoder_start_token_id=0, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config).eval()


def tiny_normed(architecture, seed):
    small = {**conftest.LLAMA, "num_hidden_layers": 2}
    if architecture == "gemma3":
        small |= {"head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = NORMED[architecture](**small, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def read(model, ids):
    """Run a text through a model; a decoder behind an encoder gets it a token later."""
    given = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor([[0, *ids[:-1]]])
    with torch.no_grad():
        model(**given)


def rows(model, path, texts):
    """What a module is handed, text by text, in float64."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
    )
    for ids in texts:
        read(model, ids)
    handle.remove()
    return torch.cat(seen)


def beside(model, block, path, texts):
    """What a block returns less what a Linear of it makes of its input, bias apart; in float64."""
    returned, added = [], []
    module = model.get_submodule(path)
    bias = 0 if module.bias is None else module.bias.detach()

    def keep(of, found, bias=0):
        of.append((found - bias).detach().reshape(-1, found.shape[-1]).double())

    handles = [
        module.register_forward_hook(lambda _, _given, found: keep(added, found, bias)),
        model.get_submodule(block).register_forward_hook(
            lambda _, _given, found: keep(returned, found[0] if type(found) is tuple else found)
        ),
    ]
    for ids in texts:
        read(model, ids)
    for handle in handles:
        handle.remove()
    return torch.cat(returned) - torch.cat(added)


def shrunk(matrix, gram, alpha):
    found = alpha * matrix
    found.diagonal().copy_(matrix.diagonal() + RIDGE * gram.diagonal().mean())
    return found


def naive(architecture, models, alpha):
    """Whole models, one module after the other, by the normal equations in float64."""
    base, *experts, merged = models
    found = {}
    blocks = [
        (f"{path}.{number}", levels)
        for path, levels in STACKS[architecture].items()
        for number in range(len(merged.get_submodule(path)))
    ]
    for block, levels in blocks:
        for level in levels:
            paths = [f"{block}.{name}" for name in level]
            pairs = [
                (rows(merged, paths[0], texts), rows(expert, paths[0], texts))
                for expert, texts in zip(experts, TEXTS, strict=True)
            ]
            gaps, last = [], level is levels[-1] and architecture not in NORMED
            if last:
                gaps = [
                    beside(expert, block, paths[0], texts) - beside(merged, block, paths[0], texts)
                    for expert, texts in zip(experts, TEXTS, strict=True)
                ]
            for path in paths:
                w0, *ws = (
                    turned(architecture, m.get_submodule(path).weight.detach().double())
                    for m in (base, *experts)
                )
                total, wanted = 0, 0
                for (x, z), w in zip(pairs, ws, strict=True):
                    gram = x.T @ x / len(x)
                    cross = shrunk(z.T @ x / len(x), gram, alpha)
                    gram = shrunk(gram, gram, alpha)
                    total, wanted = total + gram, wanted + w @ cross - w0 @ gram
                fitted = w0 + torch.linalg.solve(total, wanted.T).T
                if last:
                    missing = sum(g.T @ x / len(x) for (x, _), g in zip(pairs, gaps, strict=True))
                    more = torch.linalg.solve(total, missing.T).T
                    made = [more @ x.T / len(x) ** 0.5 for x, _ in pairs]
                    most = (more * missing).sum() / sum((one**2).sum() for one in made)
                    fitted += min(max(most, 0), 1) * more
                found[path] = turned(architecture, fitted).float()
            for path in paths:
                with torch.no_grad():
                    merged.get_submodule(path).weight.copy_(found[path])
    return found


def rows_in_block(expert, merged, block, names, ids):
    """What modules of an expert's block are handed, which gets the merged model's hidden states."""
    is_decoder, before, encoded = block.startswith("decoder."), [], []
    handles = [
        merged.get_submodule(block).register_forward_pre_hook(lambda _, a: before.append(a[0]))
    ]
    if is_decoder:
        handles.append(merged.encoder.register_forward_hook(lambda _, _a, o: encoded.append(o)))
    read(merged, ids)
    handles.append(
        expert.get_submodule(block).register_forward_pre_hook(lambda _, a: (*before, *a[1:]))
    )
    if is_decoder:
        handles.append(expert.encoder.register_forward_hook(lambda _, _a, _o: encoded[0]))
    found = [rows(expert, name, [ids]) for name in names]
    for handle in handles:
        handle.remove()
    return found


def naive_in_blocks(architecture, models, alpha):
    """RegMean++: RegMean of a block on its input in the merged model, block after block."""
    _, *experts, merged = models
    found = {}
    for path, levels in STACKS[architecture].items():
        for number in range(len(merged.get_submodule(path))):
            block = f"{path}.{number}"
            names = [f"{block}.{name}" for level in levels for name in level]
            each = []
            for expert, texts in zip(experts, TEXTS, strict=True):
                by_text = [rows_in_block(expert, merged, block, names, ids) for ids in texts]
                each.append([torch.cat(one) for one in zip(*by_text, strict=True)])
            for name, inputs in zip(names, zip(*each, strict=True), strict=True):
                total, wanted = 0, 0
                for x, expert in zip(inputs, experts, strict=True):
                    gram = shrunk(x.T @ x / len(x), x.T @ x / len(x), alpha)
                    weight = expert.get_submodule(name).weight.detach().double()
                    total, wanted = total + gram, wanted + turned(architecture, weight) @ gram
                fitted = torch.linalg.solve(total, wanted.T).T
                found[name] = turned(architecture, fitted).float()
            for name in names:
                with torch.no_grad():
                    merged.get_submodule(name).weight.copy_(found[name])
    return found


def turned(architecture, weight):
    return weight.T if architecture == "gpt2" else weight
