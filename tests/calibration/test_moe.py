"""Experts that are fused in memory, against loops over tokens with the checkpoint's own tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lewis_hub.calibration.measure import measure_inputs, measure_shifts
from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.calibration.summaries import evenness, outlier_ratios
from lewis_hub.guides.registry import find
from lewis_hub.guides.schedule import ScheduleSettings, completed, notes, schedule, seen_by_both

from .conftest import tokens_of
from .mixtures import GPT_OSS, MIXTURES, N_EXPERTS, inputs_of_experts, mixture, routed_tokens


def naive(weight: Tensor, tokens: list[Tensor], n_tokens: int) -> float:
    """sqrt(Σ_ij W_ij² a_j²), with a_j² = Σ_t x_tj² / n_tokens over the tokens routed here."""
    total = 0.0
    for j in range(weight.shape[1]):
        squared = sum(float(x[j]) ** 2 for x in tokens) / n_tokens
        total += sum(float(w) ** 2 for w in weight[:, j]) * squared
    return math.sqrt(total)


@pytest.mark.parametrize("architecture", sorted(MIXTURES))
def test_an_expert_is_measured_on_the_tokens_routed_to_it(architecture, texts, tmp_path):
    config_class, settings, place, _ = MIXTURES[architecture]
    model = mixture(config_class, settings, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    routed = routed_tokens(model, texts)

    [found] = measure_inputs(Snapshot("tiny", tmp_path), [texts], "cpu", lambda _: None)

    assert {f"{module}.weight" for module in found} <= stored.keys()
    for module, inputs in inputs_of_experts(architecture, stored, routed):
        expected = naive(stored[f"{module}.weight"], inputs, texts.n_tokens)
        assert found[module] == pytest.approx(expected, rel=1e-4), module
    experts = {module for module in found if f"{place}." in module}
    assert len(experts) == 3 * len(routed)


def test_both_stacks_of_an_encoder_decoder_are_measured(texts, tmp_path):
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4, "d_kv": 4}
    config = transformers.T5Config(**sizes, vocab_size=97, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    place = "decoder.block.1.layer.1.EncDecAttention"
    seen: dict[str, list[Tensor]] = {"q": [], "k": []}  # of the decoder's text, of the encoder's
    for name, tokens in seen.items():
        model.get_submodule(f"{place}.{name}").register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.extend(args[0][0])
        )
    with torch.no_grad():
        for ids in texts.ids:
            shifted = torch.tensor([[0, *ids[:-1]]])
            model(input_ids=torch.tensor([ids]), decoder_input_ids=shifted)

    [found] = measure_inputs(Snapshot("tiny", tmp_path), [texts], "cpu", lambda _: None)

    assert sum(module.startswith("encoder.") for module in found) == 2 * 6
    assert sum(module.startswith("decoder.") for module in found) == 2 * 10
    for name, tokens in seen.items():
        weight = model.get_submodule(f"{place}.{name}").weight.detach()
        expected = naive(weight, tokens, texts.n_tokens)
        assert found[f"{place}.{name}"] == pytest.approx(expected, rel=1e-4)


def test_what_a_router_multiplies_is_measured(texts, tmp_path):
    config_class, settings, *_ = MIXTURES["mixtral"]
    model = mixture(config_class, settings, tmp_path)
    seen: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    with torch.no_grad():
        for ids in texts.ids:
            model(torch.tensor([ids]))

    [found] = measure_inputs(Snapshot("tiny", tmp_path), [texts], "cpu", lambda _: None)

    tokens = [token for rows in seen for token in rows.reshape(-1, rows.shape[-1])]
    gate = load_file(tmp_path / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    expected = naive(gate, tokens, texts.n_tokens)
    assert found["model.layers.0.block_sparse_moe.gate"] == pytest.approx(expected, rel=1e-4)


def test_experts_that_the_file_keeps_in_one_tensor_add_up(texts, tmp_path):
    model = mixture("GptOssConfig", GPT_OSS, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    routed = routed_tokens(model, texts)

    [found] = measure_inputs(Snapshot("tiny", tmp_path), [texts], "cpu", lambda _: None)

    for block in range(len(model.model.layers)):
        name = f"model.layers.{block}.mlp.experts.gate_up_proj"
        each = [
            naive(stored[name][expert].T, routed[block, expert], texts.n_tokens)
            for expert in range(N_EXPERTS)
        ]
        assert found[name] == pytest.approx(math.hypot(*each), rel=1e-4)


def test_an_expert_that_no_token_reached_gets_its_components_mean_density_and_says_so(tmp_path):
    config_class, settings, *_ = MIXTURES["mixtral"]
    mixture(config_class, {**settings, "num_local_experts": 32}, tmp_path)
    few = tokens_of([[5, 6, 7]])
    [base] = measure_inputs(Snapshot("tiny", tmp_path), [few], "cpu", lambda _: None)
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()}
    moved = {module: value * (1 + i / 100) for i, (module, value) in enumerate(base.items())}
    profile = ImportanceProfile(
        "lewis",
        {},
        (
            SourceImportance("b", "0", "base", 3, {}, base),
            SourceImportance("e", "1", "expert", 3, {}, moved),
        ),
    )

    guided = schedule(find("lewis"), ScheduleSettings(0.3, 0.8), ["e"], shapes, profile)

    densities = guided.schedule.experts[0].tensors
    kind = [n for n in shapes if n.endswith(".w1.weight")]
    seen = [n for n in kind if n.removesuffix(".weight") in base]
    left = [n for n in kind if n not in seen]
    assert len(left) >= 3 * (32 - 6)
    mean = sum(densities[name] for name in seen) / len(seen)
    assert [densities[name] for name in left] == pytest.approx([mean] * len(left))
    n_left = sum("experts" in n and n.removesuffix(".weight") not in base for n in shapes)
    assert guided.notes[0] == (
        f"e: no calibration token reached {n_left} of the routed MoE matrices, in it or in "
        "the base: they get the mean density of their component."
    )


def test_an_expert_that_one_model_alone_used_is_not_compared():
    base = {"l.0.q": 1.0, "l.0.experts.0.up": 2.0, "l.0.experts.1.up": 3.0}
    expert = {"l.0.q": 1.5, "l.0.experts.1.up": 4.0, "l.0.experts.2.up": 5.0}

    assert seen_by_both(base, expert) == (
        {"l.0.q": 1.0, "l.0.experts.1.up": 3.0},
        {"l.0.q": 1.5, "l.0.experts.1.up": 4.0},
    )


def test_what_was_not_measured_gets_the_mean_of_its_component_or_of_all_where_that_has_none():
    sizes = {"l.0.q": 30, "l.1.q": 10, "l.2.q": 5, "l.0.experts.0.up": 60, "l.1.experts.1.up": 7}
    sizes |= {"l.1.experts.0.down": 7}
    densities = {"l.0.experts.0.up": 0.6, "l.0.q": 0.4, "l.1.q": 0.8}

    every = completed(densities, sizes)

    assert list(every) == [*densities, "l.2.q", "l.1.experts.1.up", "l.1.experts.0.down"]
    assert {name: every[name] for name in densities} == densities
    assert every["l.2.q"] == pytest.approx((30 * 0.4 + 10 * 0.8) / 40)
    assert every["l.1.experts.1.up"] == 0.6
    assert every["l.1.experts.0.down"] == pytest.approx((60 * 0.6 + 30 * 0.4 + 10 * 0.8) / 100)
    assert notes(densities, sizes) == (
        "no calibration token reached 1 of the routed MoE matrices, in it or in the base: "
        "they get the mean density of their component.",
        "the guide has no measurement of 2 of the 6 matrices of the blocks, such as l.2.q: they "
        "get the mean density of their component, or of all if it has none.",
    )


def test_nothing_is_told_where_all_was_measured_and_nothing_made_of_nothing():
    sizes = {"l.0.q": 30, "l.1.q": 10}

    assert completed({"l.1.q": 0.3, "l.0.q": 0.4}, sizes) == {"l.1.q": 0.3, "l.0.q": 0.4}
    assert notes({"l.1.q": 0.3, "l.0.q": 0.4}, sizes) == ()
    assert completed({}, sizes) == {}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_summary_is_handed_the_files_own_matrices_and_the_norms_of_their_inputs(
    architecture, texts, tmp_path
):
    config_class, settings, place, (gate, _, _) = MIXTURES[architecture]
    model = mixture(config_class, settings, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    routed = routed_tokens(model, texts)
    handed: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def summarise(weights: Any, norms: Any) -> dict[str, float]:
        handed.append((weights, norms))
        return outlier_ratios(weights, norms)

    [found] = measure_inputs(Snapshot("tiny", tmp_path), [texts], "cpu", lambda _: None, summarise)

    assert len(handed) == len(model.model.layers)
    for weights, norms in handed:
        assert weights.keys() == norms.keys()
        assert all(torch.equal(weight, stored[f"{m}.weight"]) for m, weight in weights.items())
        scores = [weight.abs() * norms[module] for module, weight in weights.items()]
        entries = torch.cat([score.flatten() for score in scores])
        far = float((entries > 5 * entries.mean()).float().mean())
        assert [found[module] for module in weights] == pytest.approx([far] * len(weights))
    for (block, expert), tokens in routed.items():
        module = f"model.layers.{block}.{place}.{expert}.{gate}"
        expected = (torch.stack(tokens).square().sum(dim=0) / texts.n_tokens).sqrt()
        norm = handed[block][1][module]
        torch.testing.assert_close(norm, expected.expand(norm.shape))
        assert evenness({}, {module: norm})[module] == pytest.approx(
            float(expected.mean() / expected.max())
        )


def test_outputs_are_told_by_the_files_names(texts, tmp_path):
    config_class, settings, *_ = MIXTURES["mixtral"]
    mixture(config_class, settings, tmp_path)
    place = Snapshot("tiny", tmp_path)

    [found] = measure_shifts(place, place, [texts], "cpu", lambda _: None)

    stored = load_file(tmp_path / "model.safetensors")
    assert {f"{module}.weight" for module in found} <= stored.keys()
    assert "model.layers.0.self_attn.o_proj" in found
    assert set(found.values()) == {0.0}
