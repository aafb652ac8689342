"""Experts of mixtures that are fused in memory, fitted by the tokens routed to each."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from statistical_merges import Recorder, merge, of_three, recipe, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import lewis_hub
from lewis_hub.methods.regmean import regmean
from tests.calibration.conftest import LLAMA, tokens_of
from tests.calibration.mixtures import GPT_OSS, MIXTURES, N_EXPERTS, routed_tokens

WORDS = "Reverse the word abcdef and write it in small letters. Answer: fedcba"
METHOD = "merge_method: regmean\nparameters: {inputs: INPUTS, off_diagonal: 0.9}\n"
KINDS = {
    "mixtral": (*MIXTURES["mixtral"][:2], "block_sparse_moe.experts.{}.w1.weight"),
    "gpt_oss": ("GptOssConfig", GPT_OSS, "mlp.experts.gate_up_proj"),
}


def recipe_of(folder, kind, n_experts=N_EXPERTS):
    config_class, settings, _ = KINDS[kind]
    told = {**LLAMA, **settings, "num_local_experts": n_experts, "vocab_size": 390}
    config = getattr(transformers, config_class)(**told, bos_token_id=1, eos_token_id=2)
    return of_three(folder, partial(AutoModelForCausalLM.from_config, config), WORDS)


def naive(folder, tensor, number, kind):
    """The fit of the first block's experts, by the tokens that each model routes to its own."""
    base, *experts = (weights(folder / name)[tensor] for name in ("base", "one", "two"))
    ids = AutoTokenizer.from_pretrained(folder / "base")(WORDS)["input_ids"]
    grams = []
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, experts_implementation="eager")
        routed = routed_tokens(model.eval(), tokens_of([ids]))[0, number]
        x = torch.stack(routed) if routed else None
        grams.append(None if x is None else (x.T @ x / len(x))[None])
    if kind == "gpt_oss":
        base, experts = base[number].T, [one[number].T for one in experts]
    vectors = torch.stack([one - base for one in experts])
    return regmean(
        *(base, vectors), weights=torch.ones(2), densities=[1, 1], grams=grams, off_diagonal=0.9
    ), all(gram is not None for gram in grams)


@pytest.mark.parametrize("inputs", ["own", pytest.param("merged", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_expert_is_fitted_by_the_tokens_that_its_own_router_sends_it(tmp_path, kind, inputs):
    text = recipe_of(tmp_path, kind) + METHOD.replace("INPUTS", inputs)

    output = merge(tmp_path / "out", text)

    found, n_fitted = weights(output), 0
    for number in range(N_EXPERTS):
        tensor = f"model.layers.0.{KINDS[kind][2].format(number)}"
        expected, is_fitted = naive(tmp_path, tensor, number, kind)
        one = found[tensor][number].T if kind == "gpt_oss" else found[tensor]
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)
        n_fitted += is_fitted
    assert n_fitted >= 2
    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(output)), rebuild=True)
    assert verdict.problems == ()


def test_experts_without_tokens_are_averaged_and_counted_where_the_file_has_each(tmp_path):
    said = Recorder()
    text = recipe_of(tmp_path, "mixtral", 32) + METHOD.replace("INPUTS", "own")

    output = merge(tmp_path / "out", text, progress=said)

    (note,) = (one for one in said.said if "have no statistics" in one)
    assert "because no token reached them" in note
    found, one, two = (weights(folder) for folder in (output, tmp_path / "one", tmp_path / "two"))
    of_experts = [name for name in found if ".experts." in name]
    averaged = [n for n in of_experts if torch.allclose(found[n], (one[n] + two[n]) / 2, atol=1e-6)]
    assert note.startswith(f"{len(averaged)} weight matrices of the blocks")
    assert 0 < len(averaged) < len(of_experts)


def test_the_disk_for_the_moments_of_a_stack_is_counted(tmp_path):
    found = []
    for n_experts in (4, 8):
        folder = tmp_path / str(n_experts)
        folder.mkdir()
        text = recipe_of(folder, "gpt_oss", n_experts) + METHOD.replace("INPUTS", "own")
        report = lewis_hub.check(recipe(text))
        found.append(report.disk_bytes - report.output_bytes)

    n_blocks, n_models, hidden, inner = 3, 2, LLAMA["hidden_size"], LLAMA["intermediate_size"]
    assert found[1] - found[0] >= 4 * n_models * n_blocks * 4 * (hidden**2 + inner**2)
