from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.grams import sum_of_squares
from lewis_hub.calibration.measure import measure_inputs
from lewis_hub.calibration.model import matrix
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.calibration.summaries import module_importance
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch, batches
from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError
from lewis_hub.methods.numerics import torch_threads

from .conftest import ARCHITECTURES, LLAMA, SMALL, activation_norms, tiny_model, tokens_of


def nothing(_: int) -> None:
    pass


def inputs_one_text_at_a_time(
    model: PreTrainedModel, texts: CalibrationTokens, paths: list[str]
) -> dict[str, list[list[float]]]:
    """Every token's input to each module, as lists; no batches, no padding, no mask."""
    seen: dict[str, list[list[float]]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, __, path=path: seen[path].extend(args[0].flatten(0, -2).tolist())
        )
        for path in paths
    ]
    with torch.no_grad():
        for ids in texts.ids:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def naive_norms(tokens: list[list[float]]) -> list[float]:
    """a_j = sqrt(mean_t x_tj²), DESIGN's definition word by word."""
    norms = []
    for j in range(len(tokens[0])):
        total = 0.0
        for token in tokens:
            total += token[j] ** 2
        norms.append(math.sqrt(total / len(tokens)))
    return norms


def naive_importance(module: nn.Module, norms: list[float]) -> float:
    """‖ |W| · a ‖_F, entry by entry."""
    weight: Any = module.weight.T if isinstance(module, Conv1D) else module.weight
    total = 0.0
    for row in weight.tolist():
        for entry, norm in zip(row, norms, strict=True):
            total += (abs(entry) * norm) ** 2
    return math.sqrt(total)


def linear_paths(model: PreTrainedModel) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and path not in ("lm_head", "embed_out")
    ]


def test_norms_and_importance_equal_a_naive_loop_over_tokens_and_weights(model, texts, saved):
    inputs = inputs_one_text_at_a_time(model, texts, linear_paths(model))
    # mamba multiplies by dt_proj's weight without calling the module: that one is not measured
    paths = [path for path in inputs if not path.endswith("dt_proj")]
    expected = {path: naive_norms(inputs[path]) for path in paths}

    norms = activation_norms(model, "tiny", batches(texts), nothing)
    [importance] = measure_inputs(Snapshot("tiny", saved(model)), [texts], "cpu", nothing)

    assert list(norms) == paths
    assert list(importance) == paths
    for path in paths:
        assert norms[path].dtype == torch.float32
        assert norms[path].tolist() == pytest.approx(expected[path], rel=2e-5)
        naive = naive_importance(model.get_submodule(path), expected[path])
        assert importance[path] == pytest.approx(naive, rel=2e-5)


def test_padding_and_batch_size_change_nothing(model, texts):
    together = activation_norms(model, "tiny", batches(texts), nothing)
    alone = activation_norms(model, "tiny", batches(texts, budget_tokens=1), nothing)

    assert together.keys() == alone.keys()
    for path, norm in together.items():
        torch.testing.assert_close(norm, alone[path], rtol=1e-5, atol=1e-7)


def test_a_model_that_accelerate_spread_is_measured_the_same(llama, texts):
    expected = activation_norms(llama, "tiny", batches(texts), nothing)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{number}" for number in range(3)]

    spread = accelerate.dispatch_model(
        llama, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True
    )

    assert hasattr(spread.model.layers[1], "_hf_hook")
    found = activation_norms(spread, "tiny", batches(texts), nothing)
    assert all(torch.equal(norm, expected[path]) for path, norm in found.items())


def test_a_model_in_bfloat16_has_statistics_in_float32(llama, texts):
    expected = activation_norms(llama, "tiny", batches(texts), nothing)

    found = activation_norms(llama.bfloat16(), "tiny", batches(texts), nothing)

    for path, norm in found.items():
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected[path], rtol=0.1, atol=0.02)


def test_what_stands_under_the_padding_changes_nothing(llama):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    other = ids.clone()
    other[0, 3:] = 55

    first = activation_norms(llama, "tiny", [TokenBatch(ids, mask)], nothing)
    second = activation_norms(llama, "tiny", [TokenBatch(other, mask)], nothing)

    assert all(torch.equal(norm, second[path]) for path, norm in first.items())


def test_two_passes_give_the_same_bits(llama, texts):
    first = activation_norms(llama, "tiny", batches(texts), nothing)
    second = activation_norms(llama, "tiny", batches(texts), nothing)

    assert all(torch.equal(norm, second[path]) for path, norm in first.items())


def test_only_matrices_inside_the_blocks_are_measured(llama, texts):
    norms = activation_norms(llama, "tiny", batches(texts), nothing)

    components = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    components += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert list(norms) == [f"model.layers.{b}.{c}" for b in range(3) for c in components]


def test_progress_counts_the_kept_tokens(llama, texts):
    counted: list[int] = []

    activation_norms(llama, "tiny", batches(texts, budget_tokens=16), counted.append)

    assert counted == [11, 8 + 5, 5 + 1]
    assert sum(counted) == texts.n_tokens


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(llama, texts, breaks):
    llama.train()
    llama.model.layers[1].eval()
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    llama.model.norm.weight.grad = torch.ones_like(llama.model.norm.weight)
    modes = [m.training for m in llama.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in llama.parameters()]
    values = {name: value.clone() for name, value in llama.state_dict().items()}
    bad = tokens_of([[10**6]]) if breaks else texts

    if breaks:
        with pytest.raises(IndexError):
            activation_norms(llama, "tiny", batches(bad), nothing)
    else:
        activation_norms(llama, "tiny", batches(bad), nothing)

    assert hooks(llama) == 0
    assert [m.training for m in llama.modules()] == modes
    assert [(p.requires_grad, p.grad is None) for p in llama.parameters()] == grads
    assert all(torch.equal(values[name], value) for name, value in llama.state_dict().items())
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_measuring(texts, saved):
    model = tiny_model("gpt2")
    norms = activation_norms(model, "tiny", batches(texts), nothing)

    [found] = measure_inputs(Snapshot("tiny", saved(model.train())), [texts], "cpu", nothing)

    modules = {path: model.get_submodule(path) for path in norms}
    assert found == {
        path: module_importance(matrix(module), norms[path]) for path, module in modules.items()
    }


def test_half_precision_inputs_are_summed_in_float32():
    """Squares of 300 overflow float16, and 2048 ones are as far as it counts."""
    rows = torch.full((3000, 2), 300.0, dtype=torch.float16)

    assert sum_of_squares(rows).tolist() == [2.7e8, 2.7e8]


class Regrouping(nn.Module):
    """A block that hands its Linear the tokens of the odd positions only, in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": nn.Linear(4, 4)})]
        )
        self.calls = 0

    device = torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        x = self.embed(input_ids)
        self.layers[0]["plain"](x)
        self.layers[0]["odd"](input=x[:, 1::2].reshape(-1, 4))


def test_a_module_that_regroups_tokens_is_measured_without_padding():
    torch.manual_seed(0)
    model: Any = Regrouping()
    texts = tokens_of([[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])

    norms = activation_norms(model, "toy", batches(texts), nothing)

    weight = model.embed.weight.detach()
    odd = weight[[2, 5, 7, 9, 11]]
    every = weight[1:12]
    share = len(odd) / len(every)  # a token that it does not see counts as zero
    expected = (odd.square().mean(0) * share).sqrt()
    assert norms["layers.0.odd"].tolist() == pytest.approx(expected.tolist())
    assert norms["layers.0.plain"].tolist() == pytest.approx(every.square().mean(0).sqrt().tolist())


class WritingInPlace(Regrouping):
    """Two Linears share an input, but it is doubled in between."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        x = self.embed(input_ids)
        self.layers[0]["plain"](x)
        x.mul_(2)
        self.layers[0]["odd"](x)


def test_a_shared_input_that_was_written_to_is_summed_again():
    model: Any = WritingInPlace()

    norms = activation_norms(model, "toy", batches(tokens_of([[1, 2, 3]])), nothing)

    assert norms["layers.0.odd"].tolist() == (2 * norms["layers.0.plain"]).tolist()


class Squaring(TorchDispatchMode):
    """Counts squares taken of whole tensors."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.n += function is torch.ops.aten.pow.Tensor_Scalar
        return function(*args, **(kwargs or {}))


def test_a_shared_input_is_summed_once(llama, texts):
    calibration = list(batches(texts))
    with Squaring() as plain, torch.no_grad():
        for batch in calibration:
            llama.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    with Squaring() as measuring:
        activation_norms(llama, "tiny", calibration, nothing)

    # of seven matrices in each of three blocks, q k v share one input, and gate up another
    assert measuring.n - plain.n == 4 * 3 * len(calibration)


def test_a_model_without_blocks_is_refused_with_a_way_out():
    model: Any = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(CalibrationModelError) as caught:
        activation_norms(model, "me/odd", [], nothing)

    assert str(caught.value) == (
        "me/odd: no Linear module in a list of blocks was found.\n"
        "Importance is measured on those; use guide `uniform` for this architecture."
    )


def test_no_token_at_all_is_an_error(llama):
    empty = TokenBatch(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))

    for calibration in ([], [empty]):
        with pytest.raises(EmptyCalibrationError) as caught:
            activation_norms(llama, "me/tiny", calibration, nothing)
        assert str(caught.value) == (
            "me/tiny: no calibration token reached a block.\n"
            "Choose calibration data with texts in it."
        )


def test_activations_that_overflow_are_an_error_naming_the_module(llama, texts):
    llama.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))

    with pytest.raises(CalibrationModelError) as caught:
        activation_norms(llama, "me/tiny", batches(texts), nothing)

    assert str(caught.value) == (
        "me/tiny: the activations before model.layers.1.mlp.down_proj are not finite.\n"
        "Its weights may be broken, or overflow in float16: try `--device cpu`."
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [[1, 97]],
            "me/tiny: token 97 of tiny is not among its 97 embeddings.\n"
            "Calibrate with the tokenizer that base and experts share.",
        ),
        (
            [[1] * 65],
            "me/tiny: a calibration text has 65 tokens, the model 64 positions.\n"
            "Set `max_tokens: 64`, or less, in the calibration.",
        ),
    ],
)
def test_tokens_that_do_not_fit_the_model_are_refused(llama, saved, ids, message):
    with pytest.raises(CalibrationModelError) as caught:
        measure_inputs(Snapshot("me/tiny", saved(llama)), [tokens_of(ids)], "cpu", nothing)

    assert str(caught.value) == message


def test_a_source_is_out_of_memory_once_it_is_measured(llama, texts, saved):
    folder = saved(llama)
    ran: list[weakref.ref[nn.Module]] = []
    watch = register_module_forward_pre_hook(lambda module, _: ran.append(weakref.ref(module)))
    gc.disable()  # reference counts alone must free it
    try:
        measure_inputs(Snapshot("base", folder), [texts], "cpu", nothing)
    finally:
        gc.enable()
        watch.remove()

    assert len(ran) > 3 * 10  # modules of its three blocks did run
    assert {module() for module in ran} == {None}


def test_several_calibration_sets_are_measured_as_if_each_were_alone(llama, texts, saved):
    folder = saved(llama)
    other = tokens_of([[20, 21, 22]])
    counted: list[int] = []

    together = measure_inputs(Snapshot("base", folder), [texts, other], "cpu", counted.append)

    assert together == [
        measure_inputs(Snapshot("base", folder), [t], "cpu", nothing)[0] for t in (texts, other)
    ]
    assert sum(counted) == texts.n_tokens + other.n_tokens


WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OF_CONV1D = {**SMALL, "n_embd": 64, "n_layer": 1, "n_head": 4}


@pytest.mark.parametrize(
    "config",
    [("LlamaConfig", WIDE), ("MixtralConfig", WIDE | EXPERTS), ("GPT2Config", OF_CONV1D)],
)
def test_a_text_of_any_length_is_measured_alike_on_any_number_of_threads(
    monkeypatch, saved, config
):
    monkeypatch.setitem(ARCHITECTURES, "wide", config)
    folder = saved(tiny_model("wide"))
    for n_tokens in (1, 3, 7, 9, 33):
        sets = [tokens_of([list(range(3, 3 + n_tokens))])]
        found = []
        for n_threads in (1, 2):
            with torch_threads(n_threads):
                found.append(measure_inputs(Snapshot("tiny", folder), sets, "cpu", lambda _: None))
        assert found[0] == found[1], n_tokens
