"""Second moments of experts that are fused in memory, against loops over the routed tokens."""

from __future__ import annotations

from shutil import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis_hub.calibration import grams
from lewis_hub.calibration.grams import DIAGONAL, WIDEST, GramRequest
from lewis_hub.calibration.measure import gather_grams
from lewis_hub.calibration.sequential import ExpertTexts, fit
from lewis_hub.calibration.subject import CalibrationSet, Subject, in_folder
from lewis_hub.methods.regmean import regmean

from .conftest import tokens_of
from .mixtures import GPT_OSS, MIXTURES, N_EXPERTS, inputs_of_experts, mixture, routed_tokens
from .naive_fits import rows


def gathered(model_folder, texts, folder, widest=WIDEST, by_block=False):
    """Module -> (its second moments, whether it is transposed)."""
    weights = in_folder("tiny", model_folder) if by_block else None
    sets = (CalibrationSet({"seed": 1}, texts),)
    subject = Subject("tiny", "abc", "expert", model_folder, sets, weights=weights)
    request = GramRequest(folder, widest, subject.gram_facts(widest))
    found = gather_grams(subject, request, "cpu", lambda _: None)
    return {
        module: (load_file(folder / one.file)[one.tensor], one.transposed)
        for module, one in found.modules.items()
    }


def mean(rows):
    rows = torch.stack(rows).double()
    return (rows.T @ rows / len(rows)).float()


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("architecture", sorted(MIXTURES))
def test_an_expert_has_the_moments_of_the_tokens_routed_to_it(
    architecture, texts, tmp_path, by_block
):
    config_class, settings, place, _ = MIXTURES[architecture]
    model = mixture(config_class, settings, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    routed = routed_tokens(model, texts)

    found = gathered(tmp_path / "model", texts, tmp_path / "grams", by_block=by_block)

    assert {f"{module}.weight" for module in found} <= stored.keys()
    for module, inputs in inputs_of_experts(architecture, stored, routed):
        gram, transposed = found[module]
        torch.testing.assert_close(gram[0], mean(inputs), rtol=1e-4, atol=1e-5)
        assert not transposed
    of_experts = {module for module in found if f"{place}." in module}
    assert len(of_experts) == 3 * len(routed)


@pytest.mark.parametrize("by_block", [False, True])
def test_experts_that_the_file_keeps_in_one_tensor_have_a_stack_of_moments(
    texts, tmp_path, by_block
):
    model = mixture("GptOssConfig", GPT_OSS, tmp_path / "model")
    routed = routed_tokens(model, texts)

    found = gathered(tmp_path / "model", texts, tmp_path / "grams", by_block=by_block)

    for block in range(len(model.model.layers)):
        gram, transposed = found[f"model.layers.{block}.mlp.experts.gate_up_proj"]
        assert gram.shape == (N_EXPERTS, 1, 16, 16)
        assert transposed
        for expert in range(N_EXPERTS):
            tokens = routed[block, expert]
            expected = mean(tokens) if tokens else torch.zeros(16, 16)
            torch.testing.assert_close(gram[expert, 0], expected, rtol=1e-4, atol=1e-5)
        assert found[f"model.layers.{block}.mlp.experts.down_proj"][0].shape[0] == N_EXPERTS


@pytest.mark.parametrize("by_block", [False, True])
def test_a_router_that_is_no_linear_has_the_moments_of_all_tokens(texts, tmp_path, by_block):
    config_class, settings, *_ = MIXTURES["mixtral"]
    model = mixture(config_class, settings, tmp_path / "model")
    seen = rows(model, "model.layers.1.mlp.gate", texts.ids)

    found = gathered(tmp_path / "model", texts, tmp_path / "grams", by_block=by_block)

    gram, transposed = found["model.layers.1.block_sparse_moe.gate"]
    assert not transposed
    assert len(seen) == texts.n_tokens
    torch.testing.assert_close(gram[0].double(), seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reached_has_none(tmp_path):
    config_class, settings, place, (gate, _, _) = MIXTURES["mixtral"]
    model = mixture(config_class, {**settings, "num_local_experts": 32}, tmp_path / "many")
    oss = mixture("GptOssConfig", {**GPT_OSS, "num_local_experts": 32}, tmp_path / "one")
    few = tokens_of([[5, 6, 7]])

    each = gathered(tmp_path / "many", few, tmp_path / "grams")
    stacked, _ = gathered(tmp_path / "one", few, tmp_path / "stacked")[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]

    reached = {expert for block, expert in routed_tokens(model, few) if block == 0}
    of_gates = {m for m in each if m.startswith("model.layers.0") and m.endswith(f".{gate}")}
    assert of_gates == {f"model.layers.0.{place}.{expert}.{gate}" for expert in reached}
    reached = {expert for block, expert in routed_tokens(oss, few) if block == 0}
    assert {number for number, one in enumerate(stacked) if one.any()} == reached


def test_the_diagonal_and_long_inputs_part_by_part_are_those_of_the_whole(texts, tmp_path):
    mixture("GptOssConfig", GPT_OSS, tmp_path / "model")
    module = "model.layers.0.mlp.experts.down_proj"

    whole, _ = gathered(tmp_path / "model", texts, tmp_path / "whole")[module]
    parts, _ = gathered(tmp_path / "model", texts, tmp_path / "parts", 8)[module]
    squares, _ = gathered(tmp_path / "model", texts, tmp_path / "squares", DIAGONAL)[module]

    assert parts.shape == (N_EXPERTS, 3, 8, 8)
    for number in range(3):
        part = slice(8 * number, 8 * number + 8)
        torch.testing.assert_close(parts[:, number], whole[:, 0, part, part])
    torch.testing.assert_close(squares.flatten(1), whole[:, 0].diagonal(dim1=1, dim2=2))


def test_passes_for_a_few_blocks_at_a_time_find_the_same(texts, tmp_path, monkeypatch):
    config_class, settings, *_ = MIXTURES["mixtral"]
    mixture(config_class, settings, tmp_path / "model")
    once = gathered(tmp_path / "model", texts, tmp_path / "once")
    monkeypatch.setattr(grams, "HELD_BYTES", 1)

    found = gathered(tmp_path / "model", texts, tmp_path / "again")

    assert found.keys() == once.keys()
    assert all(torch.equal(found[module][0], once[module][0]) for module in once)


@pytest.fixture
def models(tmp_path):
    """A base, two experts and their average, and the folders of the last three."""

    def make(config_class, told):
        names = ("base", "first", "second", "average")
        made = [mixture(config_class, told, tmp_path / n, min(i, 2)) for i, n in enumerate(names)]
        average = made[3]
        with torch.no_grad():
            for name, parameter in average.named_parameters():
                pair = [one.get_parameter(name) for one in made[1:3]]
                parameter.copy_((pair[0] + pair[1]) / 2)
        average.save_pretrained(tmp_path / "average")
        return [load_file(tmp_path / n / "model.safetensors") for n in names], made

    return make


class Solver:
    """Fits as a merge does, and keeps the moments that it was given."""

    def __init__(self, stored):
        self._base, *self._experts = stored[:3]
        self.seen = {}

    def __call__(self, tensor, seen, transposed):
        self.seen[tensor] = seen
        vectors = torch.stack([one[tensor] - self._base[tensor] for one in self._experts])
        return regmean(
            self._base[tensor],
            vectors,
            weights=torch.ones(2),
            densities=[1, 1],
            grams=[one.gram for one in seen],
            cross_covariances=[one.cross_covariance for one in seen],
            transposed=transposed,
            inputs="merged",
        )


TWO = [[[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]], [[40, 41, 42, 43, 44], [45, 46]]]


def fitted(tmp_path, output, solve, inputs):
    output.mkdir(exist_ok=True)
    experts = [
        ExpertTexts(in_folder(name, tmp_path / name), tokens_of(ids), tokens_of(ids))
        for name, ids in zip(("first", "second"), TWO, strict=True)
    ]
    merged = in_folder("average", tmp_path / "average")
    files = fit(*(merged, experts, solve, output, WIDEST, "cpu", lambda _: None), inputs=inputs)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


KINDS = {
    "mixtral": (*MIXTURES["mixtral"][:2], "block_sparse_moe.experts.{}.w1.weight"),
    "gpt_oss": ("GptOssConfig", GPT_OSS, "mlp.experts.gate_up_proj"),
}


@pytest.mark.parametrize("inputs", ["merged", "merged_block"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_experts_are_fitted_in_sequence_on_their_own_tokens(models, tmp_path, kind, inputs):
    config_class, settings, name = KINDS[kind]
    stored, (_, *experts, average) = models(config_class, settings)
    solve = Solver(stored)

    found = fitted(tmp_path, tmp_path / "fitted", solve, inputs)

    if inputs == "merged_block":  # the first block of an expert gets the merge's embeddings
        for one in experts:
            one.model.embed_tokens.load_state_dict(average.model.embed_tokens.state_dict())
    routed = [routed_tokens(one, tokens_of(ids)) for one, ids in zip(experts, TWO, strict=True)]
    for number in range(N_EXPERTS):
        tensor = f"model.layers.0.{name.format(number)}"
        tokens = [one[0, number] for one in routed]
        if not all(tokens):
            continue
        for own, seen in zip(tokens, solve.seen[tensor], strict=True):
            gram = seen.gram[number, 0] if kind == "gpt_oss" else seen.gram[0]
            torch.testing.assert_close(gram, mean(own), rtol=1e-4, atol=1e-5)
            assert seen.cross_covariance is None
        assert not torch.equal(found[tensor], stored[3][tensor])
    # the second block is fitted behind the fitted first one
    whole = tmp_path / "whole"
    average.save_pretrained(whole)
    save_file(stored[3] | found, whole / "model.safetensors", {"format": "pt"})
    merged = type(average).from_pretrained(whole, experts_implementation="eager").eval()
    q = "model.layers.1.self_attn.q_proj"
    if inputs == "merged":
        for ids, seen in zip(TWO, solve.seen[f"{q}.weight"], strict=True):
            x = rows(merged, q, ids)
            torch.testing.assert_close(
                seen.gram[0].double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_fit_of_experts_that_was_interrupted_comes_out_the_same(models, tmp_path, kind):
    config_class, settings, _ = KINDS[kind]
    stored, _ = models(config_class, settings)
    whole = fitted(tmp_path, tmp_path / "fitted", Solver(stored), "merged")
    part, solve = tmp_path / "part", Solver(stored)
    part.mkdir()
    copy(tmp_path / "fitted" / "unpadded-0.safetensors", part)

    found = fitted(tmp_path, part, solve, "merged")

    assert {name.split(".")[2] for name in solve.seen} == {"1", "2"}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_fit_of_experts_shows_no_progress_of_transformers(models, tmp_path, monkeypatch, capfd):
    stored, _ = models(*MIXTURES["mixtral"][:2])
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    monkeypatch.setattr("huggingface_hub.utils.enable_progress_bars", lambda: None)
    capfd.readouterr()

    fitted(tmp_path, tmp_path / "fitted", Solver(stored), "merged")

    assert capfd.readouterr().err == ""
