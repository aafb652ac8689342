"""Fitting a merge block by block, held against whole models and the normal equations."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis_hub.calibration import block_runs, meta_model, sequential
from lewis_hub.calibration.grams import WIDEST
from lewis_hub.calibration.hooks import CallOrder
from lewis_hub.calibration.sequential import ExpertTexts, fit
from lewis_hub.calibration.subject import in_folder
from lewis_hub.errors import NotByBlockError
from lewis_hub.methods.regmean import regmean

from . import conftest
from .conftest import tiny_model, tokens_of
from .naive_fits import (
    LEVELS,
    NORMED,
    STACKS,
    TEXTS,
    naive,
    naive_in_blocks,
    rows,
    tiny_normed,
    tiny_t5,
)


@pytest.fixture
def models(tmp_path):
    """A base, two experts and their average, and where the last three lie."""

    def make(architecture):
        build = {"t5": tiny_t5, **{name: partial(tiny_normed, name) for name in NORMED}}.get(
            architecture, partial(tiny_model, architecture)
        )
        found = [build(seed) for seed in range(3)]
        average = build(0)
        with torch.no_grad():
            for name, parameter in average.named_parameters():
                pair = [dict(one.named_parameters())[name] for one in found[1:]]
                parameter.copy_((pair[0] + pair[1]) / 2)
        made = [*found, average]
        folders = [tmp_path / name for name in ("first", "second", "average")]
        for one, folder in zip(made[1:], folders, strict=True):
            one.save_pretrained(folder)
        return made, folders

    return make


def solver(models, alpha, asked=None):
    base, *experts = (one.state_dict() for one in models[:3])

    def solve(tensor, seen, transposed):
        if asked is not None:
            asked.append(tensor)
        vectors = torch.stack([expert[tensor] - base[tensor] for expert in experts])
        return regmean(
            base[tensor],
            vectors,
            weights=torch.ones(2),
            densities=[1, 1],
            grams=[one.gram for one in seen],
            cross_covariances=[one.cross_covariance for one in seen],
            residual_covariances=[one.residual_covariance for one in seen],
            transposed=transposed,
            off_diagonal=alpha,
            inputs="merged",
        )

    return solve


def run(folders, solve, output, texts=TEXTS, advance=lambda _: None, inputs="merged"):
    output.mkdir(exist_ok=True)
    *experts, merged = folders
    asked = [
        ExpertTexts(in_folder("expert", folder), tokens_of(own), tokens_of(own))
        for folder, own in zip(experts, texts, strict=True)
    ]
    given = (in_folder("merged", merged), asked, solve, output, WIDEST, "cpu", advance)
    files = fit(*given, inputs=inputs)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("architecture", STACKS)
def test_each_matrix_is_fitted_on_what_the_merged_model_hands_it(models, tmp_path, architecture):
    made, folders = models(architecture)

    found = run(folders, solver(made, 0.7), tmp_path / "fitted")

    expected = naive(architecture, made, 0.7)
    assert set(found) == {f"{path}.weight" for path in expected}
    for path, weight in expected.items():
        torch.testing.assert_close(found[f"{path}.weight"], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba", "t5", "olmo2"])
def test_an_experts_block_gets_the_merged_models_hidden_states(models, tmp_path, architecture):
    made, folders = models(architecture)

    found = run(folders, solver(made, 0.7), tmp_path / "fitted", inputs="merged_block")

    expected = naive_in_blocks(architecture, made, 0.7)
    assert set(found) == {f"{path}.weight" for path in expected}
    for path, weight in expected.items():
        torch.testing.assert_close(found[f"{path}.weight"], weight, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_into_memory_is_computed_again(models, tmp_path, monkeypatch):
    made, folders = models("llama")
    whole = run(folders, solver(made, 0.5), tmp_path / "whole")
    monkeypatch.setattr(block_runs, "KEPT_BYTES", 6000)  # some texts of some levels

    found = run(folders, solver(made, 0.5), tmp_path / "again")

    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_each_matrix_multiplies_each_text_once_in_an_expert_and_in_the_merge(
    models, tmp_path, monkeypatch
):
    made, folders = models("llama")
    calls = Counter()
    multiply = torch.nn.Linear.forward

    def counting(module, x):
        calls[module] += len(x) > 1  # several texts, so not the few tokens that are tried
        return multiply(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)

    run(folders, solver(made, 0.5), tmp_path / "fitted")

    blocks = {module: n for module, n in calls.items() if n and module.out_features < 97}
    # the first block of an expert ran before, to see what it returns; the merge has two batches
    assert sorted(blocks.values()) == [1] * 2 * 14 + [2] * (2 * 7 + 21)


def test_matrices_are_asked_for_in_the_order_in_which_they_run(models, tmp_path):
    made, folders = models("llama")
    asked, told = [], []

    run(folders, solver(made, 0.5, asked), tmp_path / "fitted", advance=told.append)

    names = [name for level in LEVELS["llama"] for name in level]
    assert asked == [f"model.layers.{b}.{name}.weight" for b in range(3) for name in names]
    assert sum(told) == sum(len(ids) for own in TEXTS for ids in own)


def test_an_encoder_decoder_whose_fit_was_interrupted_comes_out_the_same(models, tmp_path):
    made, folders = models("t5")
    told = []
    whole = run(folders, solver(made, 0.5), tmp_path / "whole", advance=told.append)
    part, asked = tmp_path / "part", []
    part.mkdir()
    for number in range(3):  # of two blocks of each stack
        name = f"{number}.safetensors"
        save_file(load_file(tmp_path / "whole" / name), part / name)

    found = run(folders, solver(made, 0.5, asked), part)

    assert {name[: len("decoder.block.1")] for name in asked} == {"decoder.block.1"}
    assert sum(told) == sum(len(ids) for own in TEXTS for ids in own)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_blocks_that_are_there_are_taken_and_the_rest_comes_out_the_same(models, tmp_path):
    made, folders = models("llama")
    whole = run(folders, solver(made, 0.5), tmp_path / "whole")
    part, asked = tmp_path / "part", []
    part.mkdir()
    save_file(load_file(tmp_path / "whole" / "0.safetensors"), part / "0.safetensors")

    found = run(folders, solver(made, 0.5, asked), part)

    assert {name.split(".")[2] for name in asked} == {"1", "2"}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_experts_that_are_the_merge_stay_as_they_are(models, tmp_path, architecture):
    made, folders = models(architecture)
    same = [made[0], made[1], made[1]]

    found = run([folders[0]] * 3, solver(same, 0.5), tmp_path / "fitted", [TEXTS[0]] * 2)

    expert = made[1].state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expert[name], rtol=1e-3, atol=1e-3)


def routed(mlp, x):
    """An MLP whose `up_proj` sees the tokens alone that are sent to it."""
    sent = x[..., 0] > 0
    up = torch.zeros(*x.shape[:-1], mlp.up_proj.out_features)
    up[sent] = mlp.up_proj(x[sent])
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)


def test_what_chosen_tokens_reach_is_fitted_on_the_experts_own(models, tmp_path, monkeypatch):
    made, folders = models("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", routed)
    seen_of = {}

    def solve(tensor, seen, transposed):
        seen_of[tensor] = seen
        return solver(made, 0.5)(tensor, seen, transposed)

    run(folders, solve, tmp_path / "fitted")

    for block in range(3):
        own = seen_of[f"model.layers.{block}.mlp.up_proj.weight"]
        for expert, texts, seen in zip(made[1:3], TEXTS, own, strict=True):
            x = rows(expert, f"model.layers.{block}.mlp.up_proj", texts)
            assert 0 < len(x) < sum(map(len, texts))
            gram = x.T @ x / len(x)
            torch.testing.assert_close(seen.gram[0].double(), gram, rtol=1e-4, atol=1e-5)
            assert seen.cross_covariance is None
        gate = seen_of[f"model.layers.{block}.mlp.gate_proj.weight"]
        assert all(one.cross_covariance is not None for one in gate)


def test_a_matrix_mends_the_block_only_where_what_it_makes_is_added_as_it_is(
    models, tmp_path, monkeypatch
):
    made, folders = models("llama")

    def gaps(name):
        found = {}

        def solve(tensor, seen, transposed):
            found[tensor] = [one.residual_covariance is not None for one in seen]
            return solver(made, 0.5)(tensor, seen, transposed)

        run(folders, solve, tmp_path / name)
        return {tensor for tensor, known in found.items() if all(known)}

    assert gaps("added") == {f"model.layers.{block}.mlp.down_proj.weight" for block in range(3)}
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) / 2,
    )
    assert gaps("halved") == set()


class Router(torch.nn.Linear):
    """As in Llama 4 and Phi-MoE: it returns scores beside its product."""

    def forward(self, x):
        found = super().forward(x)
        return found, found.sigmoid()


def test_a_router_that_returns_more_than_its_product_is_fitted_on_the_experts_own(
    models, tmp_path, monkeypatch
):
    made, folders = models("llama")
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)[0]) * mlp.up_proj(x)),
    )
    monkeypatch.setattr(sequential, "build_stacks", with_routers(sequential.build_stacks))
    crosses = {}

    def solve(tensor, seen, transposed):
        crosses[tensor] = [one.cross_covariance is None for one in seen]
        return solver(made, 0.5)(tensor, seen, transposed)

    run(folders, solve, tmp_path / "fitted")

    assert crosses["model.layers.0.mlp.gate_proj.weight"] == [True, True]
    assert crosses["model.layers.0.mlp.up_proj.weight"] == [False, False]


def with_routers(build):
    def built(weights, device):
        found = build(weights, device)
        for block in found[0].blocks:
            block.mlp.gate_proj.__class__ = Router
        return found

    return built


def test_a_module_that_no_token_of_an_expert_reaches_is_left(models, tmp_path, monkeypatch):
    made, folders = models("llama")
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))),
    )

    found = run(folders, solver(made, 0.5), tmp_path / "fitted")

    assert "model.layers.0.mlp.up_proj.weight" not in found
    assert "model.layers.0.mlp.gate_proj.weight" in found


def test_a_module_is_of_the_level_whose_very_tensor_it_is_handed_though_another_had_it_before():
    x, y, z = (torch.ones(2, 3) for _ in range(3))
    order = CallOrder()

    for path, handed in [("twice", x), ("other", y), ("twice", z), ("last", z)]:
        order.see(path, handed)

    assert [level for level in order.levels if level] == [["twice"], ["other"], ["last"]]
    assert order.n_rows == {"twice": [2, 2], "other": [2], "last": [2]}


def every_other_block_routes(model):
    """Blocks 1, 3, ... of a model, as in decoders of which only some have experts."""
    for number, block in enumerate(model.model.layers):
        if number % 2:
            block.mlp.forward = partial(routed, block.mlp)


@pytest.mark.slow
def test_an_interrupted_fit_comes_out_the_same_where_texts_have_to_run_without_padding(
    models, tmp_path, monkeypatch
):
    deeper = {**conftest.LLAMA, "num_hidden_layers": 4}
    monkeypatch.setitem(conftest.ARCHITECTURES, "llama", ("LlamaConfig", deeper))
    made, folders = models("llama")
    empty = meta_model.build_stacks

    def built(weights, device):
        found = empty(weights, device)
        every_other_block_routes(found[0].model)
        return found

    monkeypatch.setattr(sequential, "build_stacks", built)
    whole = run(folders, solver(made, 0.5), tmp_path / "whole")
    part = tmp_path / "part"

    def stopping(tensor, seen, transposed):
        if tensor.startswith("model.layers.2."):
            raise KeyboardInterrupt
        return solver(made, 0.5)(tensor, seen, transposed)

    with pytest.raises(KeyboardInterrupt):
        run(folders, stopping, part)
    found = run(folders, solver(made, 0.5), part)

    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_module_that_is_handed_all_of_some_texts_alone_is_fitted_on_the_experts_own(
    models, tmp_path, monkeypatch
):
    def choosy(mlp, x):  # the few tokens that are tried are of the first text, of seven
        return routed(mlp, x) if x.shape[1] < 7 else mlp.down_proj(mlp.up_proj(x))

    made, folders = models("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", choosy)
    crosses = {}

    def solve(tensor, seen, transposed):
        crosses[tensor] = [one.cross_covariance is None for one in seen]
        return solver(made, 0.5)(tensor, seen, transposed)

    run(folders, solve, tmp_path / "fitted")

    assert crosses["model.layers.0.mlp.up_proj.weight"] == [True, True]
    assert crosses["model.layers.0.mlp.down_proj.weight"] == [False, False]


def test_an_expert_of_more_blocks_than_the_merge_is_refused(models, tmp_path, monkeypatch):
    made, folders = models("llama")
    deeper = {**conftest.LLAMA, "num_hidden_layers": 4}
    monkeypatch.setitem(conftest.ARCHITECTURES, "llama", ("LlamaConfig", deeper))
    tiny_model("llama").save_pretrained(folders[1])

    with pytest.raises(NotByBlockError) as caught:
        run(folders, solver(made, 0.5), tmp_path / "fitted")

    assert "its blocks have other matrices than the merge's" in str(caught.value)
