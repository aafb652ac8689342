"""Norms and biases fitted in sequence, held against least squares over the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm

from lewis_hub.calibration.affine import AffineMoments, AffineOptions, affine_update
from lewis_hub.calibration.grams import WIDEST
from lewis_hub.calibration.sequential import ExpertTexts, fit
from lewis_hub.calibration.subject import in_folder

from . import conftest
from .conftest import tiny_model, tokens_of

TEXTS = [
    [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24], [3, 30, 31, 90, 33, 34]],
    [[40, 41, 42, 43], [44, 45, 46, 47, 48, 49], [50, 60], [70, 71, 72]],
]
GEMMA = {
    **conftest.LLAMA,
    "num_hidden_layers": 2,
    "head_dim": 4,
    "layer_types": ["full_attention"] * 2,
}
FITTED = {  # a block's norms and biases; Gemma's scale is 1 plus the weight, its q_norm by head
    "llama": ["input_layernorm.weight", "post_attention_layernorm.weight"],
    "qwen2": [
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *(f"self_attn.{one}_proj.bias" for one in "qkv"),
    ],
    "gpt2": [
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *("attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"),
    ],
    "gemma2": [
        f"{one}_layernorm.weight"
        for one in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ],
}
BLOCK = {"gpt2": "transformer.h.0."}


def run(folders, texts, solve, affine_of, output):
    output.mkdir()
    *experts, merged = folders
    asked = [
        ExpertTexts(in_folder("expert", folder), tokens_of(own), tokens_of(own))
        for folder, own in zip(experts, texts, strict=True)
    ]
    weights = in_folder("merged", merged)
    files = fit(weights, asked, solve, output, WIDEST, "cpu", lambda _: None, affine_of)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", FITTED)
def test_norms_and_biases_of_the_only_expert_are_found_again(tmp_path, monkeypatch, architecture):
    monkeypatch.setitem(conftest.ARCHITECTURES, "gemma2", ("Gemma2Config", GEMMA))
    expert, merged = tiny_model(architecture), tiny_model(architecture)
    block = BLOCK.get(architecture, "model.layers.0.")
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name.removeprefix(block) in FITTED[architecture]:
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = expert.state_dict()

    found = run(
        [saved(expert, tmp_path / "expert"), saved(merged, tmp_path / "merged")],
        TEXTS[:1],
        lambda tensor, _seen, _transposed: state[tensor].clone(),
        lambda _: AffineOptions((1.0,), 0.0, torch.float32),
        tmp_path / "fitted",
    )

    vectors = {n.removeprefix(block) for n, t in found.items() if t.dim() == 1 and block in n}
    assert vectors == set(FITTED[architecture])
    for name in FITTED[architecture]:
        expected = state[block + name]
        torch.testing.assert_close(found[block + name], expected, rtol=2e-3, atol=2e-3)


def hidden_states(model, texts):
    """The input of the first block, token by token."""
    seen = []
    handle = model.transformer.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).double()


def test_a_norm_of_two_experts_is_their_least_squares_over_all_tokens(tmp_path):
    experts, merged = [tiny_model("gpt2", seed) for seed in (1, 2)], tiny_model("gpt2", 3)
    folders = [saved(one, tmp_path / str(n)) for n, one in enumerate((*experts, merged))]
    weights, state = (1.0, 3.0), merged.state_dict()

    found = run(
        folders,
        TEXTS,
        lambda tensor, _seen, _transposed: state[tensor].clone(),
        lambda name: AffineOptions(weights, 0.0, torch.float32) if "ln_1" in name else None,
        tmp_path / "fitted",
    )

    rows, wanted, shares = [], [], []
    for expert, texts, w in zip(experts, TEXTS, weights, strict=True):
        x, z = hidden_states(merged, texts), hidden_states(expert, texts)
        norm = expert.transformer.h[0].ln_1
        rows.append(layer_norm(x, x.shape[-1:], eps=norm.eps))
        own = layer_norm(z, z.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
        wanted.append(own.detach())
        shares += [np.sqrt(w / len(x))] * len(x)
    x, y, share = torch.cat(rows).numpy(), torch.cat(wanted).numpy(), np.array(shares)
    assert {name for name in found if found[name].dim() == 1} == {
        f"transformer.h.{block}.ln_1.{kind}" for block in (0, 1) for kind in ("weight", "bias")
    }
    for entry in range(x.shape[1]):
        table = np.stack([x[:, entry], np.ones(len(x))], axis=1) * share[:, None]
        scale, bias = np.linalg.lstsq(table, y[:, entry] * share, rcond=None)[0]
        assert found["transformer.h.0.ln_1.weight"][entry] == pytest.approx(scale, abs=1e-4)
        assert found["transformer.h.0.ln_1.bias"][entry] == pytest.approx(bias, abs=1e-4)


def test_a_ridge_holds_an_update_back():
    one = torch.ones(1, dtype=torch.float64)
    moments = [AffineMoments(4.0 * one, 0.0 * one, 8.0 * one, 3.0 * one)]

    free, held = (affine_update(moments, [1.0], ridge, has_bias=True) for ridge in (0.0, 1.0))
    alone = affine_update(moments, [1.0], 0.0, has_bias=False)

    # 8 / 4 and 3 / 1; with the ridge 8 / (4 + 4) and 3 / (1 + 1)
    assert (float(free.scale), float(free.bias)) == pytest.approx((2.0, 3.0), rel=1e-5)
    assert (float(held.scale), float(held.bias)) == pytest.approx((1.0, 1.5), rel=1e-5)
    assert (float(alone.scale), float(alone.bias)) == pytest.approx((2.0, 0.0), rel=1e-5)


def test_an_entry_that_no_token_moves_stays():
    zero = torch.zeros(2, dtype=torch.float64)

    found = affine_update([AffineMoments(zero, zero, zero, zero)], [1.0], 0.0, has_bias=True)

    assert found.scale.tolist() == found.bias.tolist() == [0.0, 0.0]
